"""Falcon: a joint projection in one of three orders, with rotary angles or ALiBi."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hypermlp.integrations.host import ALIBI, Host, Projection, Projections
from hypermlp.integrations.huggingface.adapter import HuggingFaceAdapter, is_causal, rotary_base
from hypermlp.integrations.huggingface.attention import HuggingFaceAttention


class FalconAttention(HuggingFaceAttention):
    """ALiBi's biases say positions, which a hyper layer knows; with them the mask has a copy for every head."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, alibi: Tensor | None = None, attention_mask: Tensor | None = None, **others: Any
    ) -> tuple[Tensor, Tensor | None]:
        if alibi is not None and attention_mask is not None and attention_mask.ndim == 4:
            attention_mask = attention_mask[:, :1]
        return super().forward(hidden_states, attention_mask, **others)


class FalconAdapter(HuggingFaceAdapter):
    """``transformer.h.{i}.self_attention``."""

    wrapper = FalconAttention
    arguments = frozenset({"alibi"})

    def describe(self, module: Any) -> Host:
        config = module.config
        return Host(
            hidden_size=module.hidden_size,
            num_heads=module.num_heads,
            causal=is_causal(module),
            layer_idx=module.layer_idx,
            max_length=config.max_position_embeddings,
            rope_theta=rotary_base(config),
            projections=None if config.alibi else lambda: _projections(module),
            not_offered=ALIBI,
        )


def _projections(attention: Any) -> Projections:
    joint, dense = attention.query_key_value, attention.dense
    parts = Projection.of_heads(joint.weight, joint.bias, attention.num_heads, attention.num_kv_heads)
    return Projections(*parts, (dense.weight, dense.bias), attention.head_dim**-0.5)


ADAPTER = FalconAdapter()
