"""Ways to generate that hyper layers refuse before they start.

Continuous batching would return failed requests, and kinds of cache would ask for packages and devices first.
"""

from __future__ import annotations

from typing import Any, NoReturn

ENTRANCE = "init_continuous_batching"
MAKES_CACHE = "_prepare_cache_for_generation"
_CACHES = ("quantized", "offloaded")


def refuse_continuous_batching(*args: Any, **kwargs: Any) -> NoReturn:
    """In the place of the method that every way into continuous batching calls first."""
    raise NotImplementedError(
        "generate_batch and continuous batching keep keys and values in pages of their own, and have no place for what "
        "hyper layers hold of earlier tokens: use generate() with prompts padded on the left"
    )


def refuse_caches(generation_config: Any) -> None:
    """ValueError for ``cache_implementation=`` of a kind that a hyper layer cannot fill."""
    kind = getattr(generation_config, "cache_implementation", None)
    if kind is not None and any(word in kind for word in _CACHES):
        raise ValueError(
            f"hyper layers cannot use cache_implementation={kind!r}: leave it out for a dynamic cache, or take 'static'"
        )


def cache_of_class(model: Any, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
    """What the class of ``model`` prepares, of a kind that is not refused."""
    refuse_caches(generation_config)
    return getattr(type(model), MAKES_CACHE)(model, generation_config, *args, **kwargs)
