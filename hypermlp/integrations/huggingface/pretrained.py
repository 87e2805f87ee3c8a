"""Opening a swapped model that ``save_pretrained`` wrote."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from hypermlp.integrations.huggingface.record import CONFIG_KEY, recorded
from hypermlp.integrations.registry import Adapter, Which, as_mapping
from hypermlp.integrations.swap import swap_attention, swapped_layers

# arguments that say which files are meant
_WHERE = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def from_pretrained(
    path: str | os.PathLike[str],
    *,
    model_class: type[PreTrainedModel] | None = None,
    adapter: Adapter | Mapping[Which, Adapter] | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """A swapped model from the folder or hub name that its ``save_pretrained`` wrote.

    The stock ``from_pretrained`` does not know hyper layers: it warns that the attention weights
    are missing and starts them at random. This one builds the layers that the config describes and
    fails if one of their weights is missing.

    Args:
        path: what to open.
        model_class: the transformers class; None for the one that was saved.
        adapter: as it came with the swap, if one did (:func:`~hypermlp.swap_attention`).
        kwargs: as for that class's own ``from_pretrained`` (``dtype``, ``device_map``, fields of the
            config, ...).

    Raises:
        ValueError: the config knows no swap, or weights of hyper layers are missing or left over.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a folder or a name on the hub, got {type(path).__name__}")
    if model_class is not None and not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise TypeError(f"model_class must be a class of transformers' models, got {model_class!r}")
    as_mapping(adapter)  # before anything is loaded
    where = {name: kwargs[name] for name in _WHERE if name in kwargs}
    # Auto classes do not know the configs of all parts
    config_class = AutoConfig if model_class is None else model_class.config_class
    config = kwargs.get("config") or config_class.from_pretrained(path, **where)
    swaps = recorded(config)
    if not swaps:
        raise ValueError(
            f"{os.fspath(path)!r} is no swapped model (no {CONFIG_KEY!r} in its config): "
            f"use {(config.architectures or ['AutoModel'])[0]}.from_pretrained. "
            "If its weights are those of hyper layers, a part of it was swapped: swap the model that is saved, or call "
            "hypermlp.integrations.huggingface.record_swaps(model) on it before save_pretrained"
        )
    stock = model_class or _saved_class(config)
    wants_info = kwargs.pop("output_loading_info", False)
    model, info = _building(stock, swaps, adapter).from_pretrained(path, output_loading_info=True, **kwargs)
    model.__class__ = stock
    wrong = _of_our_layers(model, info)
    if wrong:
        raise ValueError(f"the weights in {os.fspath(path)!r} do not fit the hyper layers of {stock.__name__}: {wrong}")
    return (model, info) if wants_info else model


def _of_our_layers(model: nn.Module, info: dict[str, Any]) -> dict[str, list[str]]:
    """Keys that do not match; those of other parts (another head, say) transformers reports itself."""
    ours = tuple(f"{name}." for name in swapped_layers(model))
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    found = {kind: sorted(str(key) for key in info.get(kind) or ()) for kind in kinds}
    found = {kind: [key for key in keys if ".mixer." in key or key.startswith(ours)] for kind, keys in found.items()}
    return {kind: keys for kind, keys in found.items() if keys}


def _building(
    stock: type[PreTrainedModel], swaps: list[dict[str, Any]], adapter: Adapter | Mapping[Which, Adapter] | None
) -> type[PreTrainedModel]:
    """``stock``, swapped as soon as it is made, so that its own loader fills the hyper layers."""

    def make(self: PreTrainedModel, config: Any, *args: Any, **kwargs: Any) -> None:
        stock.__init__(self, config, *args, **kwargs)
        rebuild(self, swaps, adapter)

    # transformers knows classes by their names
    names = {"__init__": make, "__module__": stock.__module__, "__qualname__": stock.__qualname__}
    return type(stock.__name__, (stock,), names)


def rebuild(
    model: nn.Module, swaps: list[dict[str, Any]], adapter: Adapter | Mapping[Which, Adapter] | None = None
) -> None:
    """Swap ``model`` as the config of a saved one describes; the weights are new."""
    if not isinstance(swaps, list) or not all(
        isinstance(swap, Mapping) and {"layers", "config"} <= swap.keys() for swap in swaps
    ):
        raise TypeError(f"swaps must be a list of {{'layers': [...], 'config': {{...}}}}, got {swaps!r}")
    for swap in swaps:
        fields = {name: value for name, value in swap["config"].items() if name not in ("hidden_size", "causal")}
        swap_attention(model, layers=swap["layers"], keep_originals=False, adapter=adapter, **fields)


def _saved_class(config: Any) -> type[PreTrainedModel]:
    names = config.architectures or []
    found: type[PreTrainedModel] | None = getattr(transformers, names[0], None) if names else None
    if found is None:
        raise ValueError(f"the config's architectures are {names}: say which class it is with model_class=")
    return found
