"""MPNet: an encoder's self-attention with biases by relative position, from one table for all layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hypermlp.integrations.host import RELATIVE, Host
from hypermlp.integrations.huggingface.adapter import AdapterOfPlace
from hypermlp.integrations.huggingface.attention import HuggingFaceAttention

# positions are counted from the one after the padding token's, which is 1 here whatever the config says
_BEFORE = 2


class MPNetSelfAttention(HuggingFaceAttention):
    """Does not use the biases that it is handed; returns maps only where they are asked for."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, ...]:
        if attention_mask is not None and attention_mask.ndim == 4:
            # older releases have one row for all queries
            attention_mask = attention_mask.expand(-1, -1, hidden_states.shape[1], -1)
        out, weights = super().forward(hidden_states, attention_mask, **others)
        return (out,) if weights is None else (out, weights)


class MPNetAdapter(AdapterOfPlace):
    """``mpnet.encoder.layer.{i}.attention.attn``."""

    wrapper = MPNetSelfAttention
    arguments = frozenset({"position_bias"})

    def describe(self, module: Any) -> Host:
        return Host(
            hidden_size=self.config.hidden_size,
            num_heads=module.num_attention_heads,
            causal=False,
            max_length=self.config.max_position_embeddings - _BEFORE,
            not_offered=RELATIVE,
            notes=("the table of those biases stays in the model, with no gradient where all layers are replaced",),
        )


ADAPTER = MPNetAdapter()
