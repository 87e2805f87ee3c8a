"""GPT-BigCode (StarCoder): GPT-2 with a key and a value for all heads or for each, in plain linear layers."""

from __future__ import annotations

from typing import Any

from hypermlp.integrations.host import Projection, Projections
from hypermlp.integrations.hosts.gpt2 import GPT2Adapter


class GPTBigCodeAdapter(GPT2Adapter):
    """``transformer.h.{i}.attn``."""

    def projections(self, module: Any) -> Projections:
        joint, last, heads = module.c_attn, module.c_proj, module.num_heads
        # a key and a value for all heads stand at the end, either way to read them
        parts = Projection.of_heads(joint.weight, joint.bias, heads, 1 if module.multi_query else heads)
        return Projections(*parts, (last.weight, last.bias), module.scaling)


ADAPTER = GPTBigCodeAdapter()
