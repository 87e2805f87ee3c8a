"""ModernBERT: a joint projection and rotary angles; the layers that see every token are replaced, local ones stay."""

from __future__ import annotations

from typing import Any

from hypermlp.integrations.host import Host, Projections
from hypermlp.integrations.huggingface.adapter import BOTH_SIDES, HuggingFaceAdapter, rotary_base


class ModernBertAdapter(HuggingFaceAdapter):
    """``model.layers.{i}.attn``."""

    def skip(self, module: Any) -> str | None:
        return super().skip(module) if module.sliding_window is None else BOTH_SIDES

    def describe(self, module: Any) -> Host:
        config = module.config
        return Host(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            causal=False,
            max_length=config.max_position_embeddings,
            rope_theta=rotary_base(config, config.layer_types[module.layer_idx]),
            output_dropout=getattr(module.out_drop, "p", 0.0),
            projections=lambda: Projections.of_joint(
                module.Wqkv.weight, module.Wqkv.bias, module.Wo, config.num_attention_heads, module.head_dim**-0.5
            ),
        )


ADAPTER = ModernBertAdapter()
