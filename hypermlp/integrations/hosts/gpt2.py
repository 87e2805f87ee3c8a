"""GPT-2 of transformers: one projection for queries, keys and values, stored transposed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hypermlp.integrations.host import Host, Projection, Projections
from hypermlp.integrations.huggingface.adapter import HuggingFaceAdapter, is_causal
from hypermlp.integrations.sites import CROSS


class GPT2Adapter(HuggingFaceAdapter):
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
            projections=lambda: self.projections(module),
        )

    def projections(self, module: Any) -> Projections:
        """Its weights, for ``init="from_attention"``."""
        joint = Projection.of_joint(_weight(module.c_attn), module.c_attn.bias, module.num_heads)
        return Projections(*joint, (_weight(module.c_proj), module.c_proj.bias), module.scaling)


def _weight(linear: Any) -> Tensor:
    """``[out, in]``; Conv1D keeps it transposed, and bitsandbytes puts linear layers in its place."""
    weight: Tensor = linear.weight
    return weight if isinstance(linear, nn.Linear) else weight.T


ADAPTER = GPT2Adapter()
