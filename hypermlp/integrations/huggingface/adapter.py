"""What the adapters of all transformers models share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from hypermlp.integrations.host import Host
from hypermlp.integrations.huggingface.attention import attention_class
from hypermlp.integrations.huggingface.record import note_swaps
from hypermlp.integrations.registry import Adapter
from hypermlp.layers import AttentionLayer


class HuggingFaceAdapter(Adapter):
    """Wraps the layer in a module with the host's calling convention, and notes the swap in the config."""

    def wrap(self, layer: AttentionLayer, module: Any, host: Host) -> nn.Module:
        host_class: Any = type(module)
        return attention_class(host_class)(layer, module.config, host.output_dropout)

    def finish(self, model: Any, swaps: Sequence[Mapping[str, Any]]) -> None:
        """Places in the record are those in each transformers model, which ``model`` may be, or hold."""
        note_swaps(model)


def rotary_base(config: Any) -> float | None:
    """Base of the rotary frequencies where every channel is rotated; None for anything scaled or partial."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        return None
    theta: float | None = rope.get("rope_theta")
    return theta
