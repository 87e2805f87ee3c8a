"""GPT-2 of transformers: one projection for queries, keys and values, stored transposed."""

from __future__ import annotations

from typing import Any

from torch import nn

from hypermlp.integrations.host import Host, Projection, Projections
from hypermlp.integrations.huggingface.adapter import HuggingFaceAdapter
from hypermlp.integrations.registry import register


class GPT2Adapter(HuggingFaceAdapter):
    """``transformer.h.{i}.attn``."""

    def skip(self, module: Any) -> str | None:
        return "cross-attention reads another sequence" if module.is_cross_attention else None

    def describe(self, module: Any) -> Host:
        return Host(
            hidden_size=module.embed_dim,
            num_heads=module.num_heads,
            layer_idx=module.layer_idx,
            max_length=module.config.max_position_embeddings,
            output_dropout=module.resid_dropout.p,
            projections=lambda: _projections(module),
        )


def _projections(module: nn.Module) -> Projections:
    attention: Any = module
    # Conv1D keeps [in, out]
    joint = Projection.of_joint(attention.c_attn.weight.T, attention.c_attn.bias, attention.num_heads)
    return Projections(*joint, (attention.c_proj.weight.T, attention.c_proj.bias), attention.scaling)


register(GPT2Adapter(), "GPT2Attention")
