"""GPT-NeoX (Pythia): one projection, in which each head's query, key and value stand together."""

from __future__ import annotations

from typing import Any

from torch import nn

from hypermlp.integrations.host import Host, Projection, Projections
from hypermlp.integrations.huggingface.adapter import HuggingFaceAdapter, is_causal, rotary_base


class GPTNeoXAdapter(HuggingFaceAdapter):
    """``gpt_neox.layers.{i}.attention``."""

    def describe(self, module: Any) -> Host:
        config = module.config
        return Host(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            causal=is_causal(module),
            layer_idx=module.layer_idx,
            max_length=config.max_position_embeddings,
            rope_theta=rotary_base(config),
            projections=lambda: _projections(module),
        )


def _projections(module: nn.Module) -> Projections:
    attention: Any = module
    joint = attention.query_key_value
    query, key, value = Projection.of_heads(joint.weight, joint.bias, attention.config.num_attention_heads)
    return Projections(query, key, value, (attention.dense.weight, attention.dense.bias), attention.scaling)


ADAPTER = GPTNeoXAdapter()
