"""What the adapters of all transformers models share."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from hypermlp.integrations.host import Host, Projection, Projections, nearest
from hypermlp.integrations.huggingface.attention import HuggingFaceAttention, attention_class
from hypermlp.integrations.huggingface.names import IGNORED_BY_ATTENTION
from hypermlp.integrations.huggingface.record import note_swaps
from hypermlp.integrations.registry import Adapter
from hypermlp.layers import AttentionLayer

BOTH_SIDES = (
    "its window reaches to both sides, and a bidirectional hyper layer sees every token (layers without a window are "
    "replaced)"
)


class HuggingFaceAdapter(Adapter):
    """Wraps the layer in a module with the host's calling convention, and notes the swap in the config.

    Attributes:
        wrapper: what stands in the host's place.
        arguments: names in the host's ``forward`` beside those that the wrapper has and may ignore, which are
            None in every call of self-attention, or which the wrapper reads.
    """

    wrapper: ClassVar[type[HuggingFaceAttention]] = HuggingFaceAttention
    arguments: ClassVar[frozenset[str]] = frozenset()

    def skip(self, module: nn.Module) -> str | None:
        """Attention that is called otherwise than its adapter knows stays."""
        called = set(inspect.signature(type(module).forward).parameters) - {"self", "args", "kwargs"}
        strange = sorted(called - _KNOWN - self.arguments)
        return f"it is called with {', '.join(strange)}, which its adapter does not know" if strange else None

    def wrap(self, layer: AttentionLayer, module: Any, host: Host) -> nn.Module:
        host_class: Any = type(module)
        wrapper: Any = self.wrapper
        return attention_class(host_class, wrapper)(layer, self._config(module), host.output_dropout)

    def finish(self, model: Any, swaps: Sequence[Mapping[str, Any]]) -> None:
        """Places in the record are those in each transformers model, which ``model`` may be, or hold."""
        note_swaps(model)

    def _config(self, module: Any) -> Any:
        return module.config


class AdapterOfPlace(HuggingFaceAdapter):
    """For attention that does not know its config, which is then that of the nearest module around it.

    Args:
        config: that one.
    """

    def __init__(self, config: Any = None) -> None:
        self.config = config

    def at(self, model: nn.Module, name: str) -> Adapter:
        config = nearest(model, name, lambda host: getattr(host, "config", None))
        if config is None:
            raise ValueError(f"{name} does not know its config, and no module around it has one: give the whole model")
        return type(self)(config)

    def _config(self, module: Any) -> Any:
        return self.config


_KNOWN = {*IGNORED_BY_ATTENTION, *inspect.signature(HuggingFaceAttention.forward).parameters}


def rotary_base(config: Any, layer_type: str | None = None) -> float | None:
    """Base of the rotary frequencies where every channel is rotated; None for anything scaled or partial.

    Args:
        config: the host's.
        layer_type: of the layer, where each type has frequencies of its own.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get(layer_type, rope)
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        return None
    theta: float | None = rope.get("rope_theta")
    return theta


def is_causal(module: Any) -> bool:
    """Whether a decoder's attention hides later tokens: a config, or whoever loads it, may make it bidirectional."""
    return bool(getattr(module, "is_causal", True) and getattr(module.config, "is_causal", True))


def separate(
    module: Any, names: Sequence[str], heads: int, scaling: float, key_heads: int | None = None
) -> Projections:
    """Projections in linear layers of their own.

    Args:
        module: the host.
        names: of query, key, value and, if it has one, output.
        heads: of queries.
        scaling: factor of the scores.
        key_heads: of keys and values; None for as many.
    """
    linears = [getattr(module, name) for name in names]
    counts = (heads, key_heads or heads, key_heads or heads)
    query, key, value = (Projection.of(x.weight, x.bias, count) for x, count in zip(linears, counts, strict=False))
    return Projections(query, key, value, (linears[3].weight, linears[3].bias) if linears[3:] else None, scaling)


def halves(projection: Projection) -> Projection:
    """Channels that are rotated in pairs of neighbours, in the order in which a hyper layer pairs them."""
    weight = projection.weight
    order = torch.arange(weight.shape[1], device=weight.device).reshape(-1, 2).T.flatten()
    return projection.each(lambda x: x[:, order])
