"""GPT-NeoX (Pythia): one projection, in which each head's query, key and value stand together."""

from __future__ import annotations

from typing import Any

from hypermlp.integrations.host import Projection, Projections
from hypermlp.integrations.hosts.llama import LlamaAdapter


class GPTNeoXAdapter(LlamaAdapter):
    """``gpt_neox.layers.{i}.attention``."""

    def projections(self, module: Any) -> Projections:
        joint, dense, config = module.query_key_value, module.dense, module.config
        heads = config.num_attention_heads
        # of Falcon several heads may share a key and a value
        parts = Projection.of_heads(joint.weight, joint.bias, heads, getattr(module, "num_kv_heads", None))
        return Projections(*parts, (dense.weight, dense.bias), (config.hidden_size // heads) ** -0.5)


ADAPTER = GPTNeoXAdapter()
