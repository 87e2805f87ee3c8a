"""GPT-BigCode (StarCoder): one projection, with a key and a value for all heads or for each."""

from __future__ import annotations

from typing import Any

from hypermlp.integrations.host import Host, Projection, Projections
from hypermlp.integrations.huggingface.adapter import HuggingFaceAdapter, is_causal
from hypermlp.integrations.sites import CROSS


class GPTBigCodeAdapter(HuggingFaceAdapter):
    """``transformer.h.{i}.attn``."""

    arguments = frozenset({"encoder_hidden_states", "encoder_attention_mask"})

    def skip(self, module: Any) -> str | None:
        return CROSS if module.is_cross_attention else super().skip(module)

    def describe(self, module: Any) -> Host:
        return Host(
            hidden_size=module.embed_dim,
            num_heads=module.num_heads,
            causal=is_causal(module),
            layer_idx=module.layer_idx,
            max_length=module.config.max_position_embeddings,
            output_dropout=module.resid_dropout.p,
            projections=lambda: _projections(module),
        )


def _projections(module: Any) -> Projections:
    joint = module.c_attn
    if module.multi_query:
        sizes, heads = (module.embed_dim, module.kv_dim, module.kv_dim), (module.num_heads, 1, 1)
        parts = zip(joint.weight.split(sizes), joint.bias.split(sizes), heads, strict=True)
        query, key, value = (Projection.of(*part) for part in parts)
    else:
        query, key, value = Projection.of_heads(joint.weight, joint.bias, module.num_heads)
    return Projections(query, key, value, (module.c_proj.weight, module.c_proj.bias), module.scaling)


ADAPTER = GPTBigCodeAdapter()
