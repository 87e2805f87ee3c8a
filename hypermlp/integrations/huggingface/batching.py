"""Continuous batching, which hyper layers refuse before it starts: transformers would return failed requests."""

from __future__ import annotations

from typing import Any, NoReturn

ENTRANCE = "init_continuous_batching"


def refuse_continuous_batching(*args: Any, **kwargs: Any) -> NoReturn:
    """In the place of the method that every way into continuous batching calls first."""
    raise NotImplementedError(
        "generate_batch and continuous batching keep keys and values in pages of their own, and have no place for what "
        "hyper layers hold of earlier tokens: use generate() with prompts padded on the left"
    )


def mark_continuous_batching(model: Any, swapped: bool) -> None:
    """Let a swapped model refuse, and an unswapped one go on as its class says."""
    if swapped and hasattr(model, ENTRANCE):
        setattr(model, ENTRANCE, refuse_continuous_batching)
    else:
        model.__dict__.pop(ENTRANCE, None)
