"""DistilBERT: an encoder's self-attention with its output projection."""

from __future__ import annotations

from typing import Any

from hypermlp.integrations.host import Host
from hypermlp.integrations.huggingface.adapter import HuggingFaceAdapter, separate


class DistilBertAdapter(HuggingFaceAdapter):
    """``distilbert.transformer.layer.{i}.attention``."""

    def describe(self, module: Any) -> Host:
        return Host(
            hidden_size=module.dim,
            num_heads=module.n_heads,
            causal=False,
            max_length=module.config.max_position_embeddings,
            projections=lambda: separate(
                module, ("q_lin", "k_lin", "v_lin", "out_lin"), module.n_heads, module.attention_head_size**-0.5
            ),
        )


ADAPTER = DistilBertAdapter()
