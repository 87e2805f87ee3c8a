"""What every attention layer of a model is given in one forward."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hypermlp.checks import check_kind
from hypermlp.evaluating import evaluating
from hypermlp.layers import AttentionLayer


class LayerCall(NamedTuple):
    """One call of an attention layer.

    Attributes:
        name: the layer's name in the model; empty for the model itself.
        layer: the layer.
        hidden_states: ``[B, T, hidden_size]``.
        attention_mask: ``[B, T]``, 1 for a valid token; None if all are.
        cu_seqlens: bounds of packed sequences, ``[N + 1]``; None for one sequence a row.
    """

    name: str
    layer: AttentionLayer
    hidden_states: Tensor
    attention_mask: Tensor | None
    cu_seqlens: Tensor | None


def record(model: nn.Module, *args: Any, **kwargs: Any) -> list[LayerCall]:
    """Run ``model(*args, **kwargs)`` once, and keep what every attention layer of this library was given.

    The run is in evaluation mode and without gradients; the model's mode, hooks and weights are afterwards what they
    were. A compiled model runs uncompiled.

    Args:
        model: a layer, a language model, a model of the Hugging Face family, or any model with swapped layers.
        args, kwargs: what the model takes.

    Returns:
        The calls in their order; a layer that runs twice has two.

    Raises:
        ValueError: no such layer was called, or one was called with earlier tokens in a cache.
    """
    check_kind("model", model, nn.Module)
    found: list[LayerCall] = []
    names = {module: name for name, module in model.named_modules() if isinstance(module, AttentionLayer)}

    def keep(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(layer, AttentionLayer)
        given = dict(zip(("hidden_states", "attention_mask"), args, strict=False)) | kwargs
        if "hidden_states" not in given:
            return  # the call itself says so
        part = given.get("cache")
        if part is not None and not layer.cache_part(part).empty:
            raise ValueError(f"{names[layer]} was called with a cache of earlier tokens: give all tokens in one call")
        mask, bounds = (None if y is None else y.clone() for y in map(given.get, ("attention_mask", "cu_seqlens")))
        # a copy: what comes after the layer may write into its input
        found.append(LayerCall(names[layer], layer, given["hidden_states"].clone(), mask, bounds))

    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in names]
    try:
        with evaluating(model), torch.no_grad(), _uncompiled():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise ValueError(
            f"no attention layer of this library was called in {type(model).__name__}: give a model that has some, "
            "or swap them in by hypermlp.swap_attention"
        )
    return found


def _uncompiled() -> AbstractContextManager[Any]:
    """Hooks are not seen by what is compiled already. Without the compiler loaded nothing is."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
