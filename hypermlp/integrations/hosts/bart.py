"""BART and what is built like it: one class for self- and cross-attention, of text and of sound."""

from __future__ import annotations

from typing import Any

from torch import nn

from hypermlp.integrations.host import Host
from hypermlp.integrations.huggingface.adapter import HuggingFaceAdapter, is_causal, separate
from hypermlp.integrations.registry import Adapter
from hypermlp.integrations.sites import CROSS_ATTENTION


class BartAdapter(HuggingFaceAdapter):
    """``model.{encoder,decoder}.layers.{i}.self_attn``; ``encoder_attn`` stays the host's."""

    arguments = frozenset({"key_value_states"})

    def at(self, model: nn.Module, name: str) -> Adapter:
        return CROSS_ATTENTION if name.rpartition(".")[2] in ("encoder_attn", "cross_attn") else self

    def describe(self, module: Any) -> Host:
        return Host(
            hidden_size=module.embed_dim,
            num_heads=module.num_heads,
            causal=is_causal(module),
            layer_idx=getattr(module, "layer_idx", None),
            max_length=_length(module),
            projections=lambda: separate(
                module, ("q_proj", "k_proj", "v_proj", "out_proj"), module.num_heads, module.head_dim**-0.5
            ),
        )


def _length(module: Any) -> int | None:
    """Tokens that the model has positions for; Whisper's encoder and decoder have different ones."""
    names = (
        "max_target_positions" if getattr(module, "is_decoder", False) else "max_source_positions",
        "max_position_embeddings",
    )
    return next((getattr(module.config, name) for name in names if hasattr(module.config, name)), None)


ADAPTER = BartAdapter()
