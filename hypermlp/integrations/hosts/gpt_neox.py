"""GPT-NeoX (Pythia): one projection, in which each head's query, key and value stand together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypermlp.integrations.host import Host, Projection, Projections
from hypermlp.integrations.hosts.llama import LlamaAdapter


class GPTNeoXAdapter(LlamaAdapter):
    """``gpt_neox.layers.{i}.attention``."""

    def describe(self, module: Any) -> Host:
        # windows and scores of Llama's kin, which a config may name and this attention does not have
        host = replace(super().describe(module), window=None, not_offered="")
        return replace(host, projections=lambda: self.projections(module))

    def projections(self, module: Any) -> Projections:
        joint, dense, config = module.query_key_value, module.dense, module.config
        heads = config.num_attention_heads
        # of Falcon several heads may share a key and a value
        parts = Projection.of_heads(joint.weight, joint.bias, heads, getattr(module, "num_kv_heads", None))
        return Projections(*parts, (dense.weight, dense.bias), (config.hidden_size // heads) ** -0.5)


ADAPTER = GPTNeoXAdapter()
