"""Falcon: a joint projection in one of three orders, with rotary angles or ALiBi."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from hypermlp.integrations.host import ALIBI, Host
from hypermlp.integrations.hosts.gpt_neox import GPTNeoXAdapter
from hypermlp.integrations.huggingface.attention import HuggingFaceAttention


class FalconAttention(HuggingFaceAttention):
    """ALiBi's biases say positions, which a hyper layer knows; with them the mask has a copy for every head."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, alibi: Tensor | None = None, attention_mask: Tensor | None = None, **others: Any
    ) -> tuple[Tensor, Tensor | None]:
        if alibi is not None and attention_mask is not None and attention_mask.ndim == 4:
            attention_mask = attention_mask[:, :1]
        return super().forward(hidden_states, attention_mask, **others)


class FalconAdapter(GPTNeoXAdapter):
    """``transformer.h.{i}.self_attention``."""

    wrapper = FalconAttention
    arguments = frozenset({"alibi"})

    def describe(self, module: Any) -> Host:
        host = super().describe(module)
        return replace(host, projections=None, not_offered=ALIBI) if module.config.alibi else host


ADAPTER = FalconAdapter()
