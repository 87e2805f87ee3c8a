"""What stands in a swapped model, noted in its config: ``save_pretrained`` writes it, ``from_pretrained`` reads it.

Other models may hold the same config object, so a model gets one of its own before anything is noted.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hypermlp.integrations.huggingface.refused import ENTRANCE, MAKES_CACHE, cache_of_class, refuse_continuous_batching
from hypermlp.integrations.sites import holds_replacements, replaced_by, swaps_in

CONFIG_KEY = "hypermlp"

Swaps = list[dict[str, Any]]


def note_swaps(root: nn.Module) -> None:
    """Note what stands in every transformers model that ``root`` is or holds."""
    noted: tuple[str, ...] = ()
    for name, model in list(root.named_modules()):
        if not isinstance(model, PreTrainedModel):
            continue
        _let_methods_know(model)
        # a model within another one has the other's config, or a part of it
        if not name.startswith(noted or "."):
            noted += (f"{name}." if name else "",)
            swaps = swaps_in(model)
            if swaps != recorded(model.config):
                _give_config(root, name, swaps)


def record_swaps(model: PreTrainedModel) -> None:
    """Note in the config of ``model`` what stands in it, where parts of it have been swapped on their own.

    A swap is noted in the config of what was swapped. After ``swap_attention(model.encoder)`` the config of ``model``
    knows nothing of it, and a saved ``model`` could not be opened: call this on ``model`` once, before it is saved.

    Args:
        model: the model that will be saved.

    Raises:
        ValueError: nothing in it has been swapped.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a model of transformers, got {type(model).__name__}")
    if not holds_replacements(model):
        raise ValueError(f"nothing in this {type(model).__name__} has been swapped: there is nothing to record")
    note_swaps(model)


def recorded(config: Any) -> Swaps:
    """The swaps that a config knows of."""
    found: Swaps = getattr(config, CONFIG_KEY, [])
    return found


def _note(config: Any, swaps: Swaps) -> None:
    if swaps:
        setattr(config, CONFIG_KEY, swaps)
    elif hasattr(config, CONFIG_KEY):
        delattr(config, CONFIG_KEY)


def _give_config(root: nn.Module, name: str, swaps: Swaps) -> None:
    """A config of its own, with the swaps noted, for the model called ``name`` and all that held the old one there."""
    new: dict[int, Any] = {}
    _note(copy.deepcopy(root.get_submodule(name).config, new), swaps)
    for holder in _holders(root, name):
        for key, value in list(vars(holder).items()):
            if isinstance(value, PreTrainedConfig) and id(value) in new:
                setattr(holder, key, new[id(value)])


def _holders(root: nn.Module, name: str) -> Iterator[nn.Module]:
    """Modules around and in the one called ``name``, and originals that wait to be restored."""
    parts = name.split(".") if name else []
    yield from (root.get_submodule(".".join(parts[:depth])) for depth in range(len(parts)))
    for module in root.get_submodule(name).modules():
        yield module
        original = replaced_by(module)
        if original is not None:
            yield from original.modules()


def _let_methods_know(model: Any) -> None:
    """Let a swapped model save what stands there, and refuse what it cannot; others go on as their class says."""
    swapped = holds_replacements(model)
    methods = {
        "save_pretrained": partial(_save_pretrained, model),
        ENTRANCE: refuse_continuous_batching,
        MAKES_CACHE: partial(cache_of_class, model),
    }
    for name, method in methods.items():
        if swapped and hasattr(model, name):
            setattr(model, name, method)
        else:
            model.__dict__.pop(name, None)


def _save_pretrained(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Looks what stands there: layers may have been taken out since the swap."""
    kept, swaps = model.config, swaps_in(model)
    if swaps != recorded(kept):
        model.config = copy.deepcopy(kept)
        _note(model.config, swaps)
    try:
        return type(model).save_pretrained(model, *args, **kwargs)
    finally:
        model.config = kept
