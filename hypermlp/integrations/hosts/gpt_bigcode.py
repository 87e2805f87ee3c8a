"""GPT-BigCode (StarCoder): GPT-2 with a key and a value for all heads or for each, in plain linear layers."""

from __future__ import annotations

from typing import Any

from hypermlp.integrations.host import Projection, Projections
from hypermlp.integrations.hosts.gpt2 import GPT2Adapter


class GPTBigCodeAdapter(GPT2Adapter):
    """``transformer.h.{i}.attn``."""

    def projections(self, module: Any) -> Projections:
        joint = module.c_attn
        if module.multi_query:
            sizes, heads = (module.embed_dim, module.kv_dim, module.kv_dim), (module.num_heads, 1, 1)
            parts = zip(joint.weight.split(sizes), joint.bias.split(sizes), heads, strict=True)
            query, key, value = (Projection.of(*part) for part in parts)
        else:
            query, key, value = Projection.of_heads(joint.weight, joint.bias, module.num_heads)
        return Projections(query, key, value, (module.c_proj.weight, module.c_proj.bias), module.scaling)


ADAPTER = GPTBigCodeAdapter()
