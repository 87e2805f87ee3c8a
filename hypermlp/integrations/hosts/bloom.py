"""Bloom: scores with biases by distance (ALiBi), and the residual and its dropout inside the attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hypermlp.integrations.host import ALIBI, Host
from hypermlp.integrations.huggingface.adapter import AdapterOfPlace
from hypermlp.integrations.huggingface.attention import HuggingFaceAttention


class BloomAttention(HuggingFaceAttention):
    """Adds ``residual`` to its output, as the host does; ``alibi`` says positions, which a hyper layer knows."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        out, weights = super().forward(hidden_states, attention_mask, **others)
        return residual + out, weights


class BloomAdapter(AdapterOfPlace):
    """``transformer.h.{i}.self_attention``."""

    wrapper = BloomAttention
    arguments = frozenset({"residual", "alibi"})

    def describe(self, module: Any) -> Host:
        return Host(
            hidden_size=module.hidden_size,
            num_heads=module.num_heads,
            causal=getattr(self.config, "is_causal", True),
            layer_idx=module.layer_idx,
            # no field of the config's class, but checkpoints have it
            max_length=getattr(self.config, "seq_length", None),
            output_dropout=module.hidden_dropout,
            not_offered=ALIBI,
        )


ADAPTER = BloomAdapter()
