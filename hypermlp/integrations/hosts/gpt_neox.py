"""GPT-NeoX (Pythia): one projection, in which each head's query, key and value stand together."""

from __future__ import annotations

from typing import Any

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


def _projections(module: Any) -> Projections:
    joint, dense = module.query_key_value, module.dense
    parts = Projection.of_heads(joint.weight, joint.bias, module.config.num_attention_heads)
    return Projections(*parts, (dense.weight, dense.bias), module.scaling)


ADAPTER = GPTNeoXAdapter()
