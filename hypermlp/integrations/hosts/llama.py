"""Llama and the models built like it: separate projections, keys and values in groups, rotary angles."""

from __future__ import annotations

from typing import Any

from torch import nn

from hypermlp.integrations.host import Host, Projection, Projections
from hypermlp.integrations.huggingface.adapter import HuggingFaceAdapter, rotary_base
from hypermlp.integrations.registry import register


class LlamaAdapter(HuggingFaceAdapter):
    """``model.layers.{i}.self_attn`` of Llama, Mistral, Qwen2 and Qwen3."""

    def describe(self, module: Any) -> Host:
        config = module.config
        return Host(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            layer_idx=module.layer_idx,
            max_length=config.max_position_embeddings,
            # Mistral says it in its config alone
            window=getattr(module, "sliding_window", getattr(config, "sliding_window", None)),
            rope_theta=rotary_base(config),
            projections=lambda: _projections(module),
        )


def _projections(module: nn.Module) -> Projections:
    attention: Any = module
    config = attention.config

    def part(linear: nn.Linear, heads: int) -> Projection:
        return Projection.of(linear.weight, linear.bias, heads)

    return Projections(
        part(attention.q_proj, config.num_attention_heads),
        part(attention.k_proj, config.num_key_value_heads),
        part(attention.v_proj, config.num_key_value_heads),
        (attention.o_proj.weight, attention.o_proj.bias),
        attention.scaling,
    )


register(LlamaAdapter(), "LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention")
