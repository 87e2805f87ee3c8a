"""BERT: the self-attention without its output projection, which a module beside it holds."""

from __future__ import annotations

from typing import Any

from torch import nn

from hypermlp.integrations.host import Host, Projection, Projections
from hypermlp.integrations.huggingface.adapter import HuggingFaceAdapter
from hypermlp.integrations.registry import register


class BertAdapter(HuggingFaceAdapter):
    """``bert.encoder.layer.{i}.attention.self``, in an encoder or a decoder."""

    def describe(self, module: Any) -> Host:
        config = module.config
        return Host(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            causal=config.is_decoder,
            layer_idx=module.layer_idx,
            max_length=config.max_position_embeddings,
            output_projection=False,
            projections=lambda: _projections(module),
        )


def _projections(module: nn.Module) -> Projections:
    attention: Any = module
    heads = attention.config.num_attention_heads
    query, key, value = (
        Projection.of(linear.weight, linear.bias, heads) for linear in (attention.query, attention.key, attention.value)
    )
    return Projections(query, key, value, output=None, scaling=attention.attention_head_size**-0.5)


register(BertAdapter(), "BertSelfAttention")
