"""Layers whose heads read through the operator."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from hypermlp.layers.base import AttentionLayer
from hypermlp.layers.feature_mixing import Gates
from hypermlp.ops import SequenceMix, hyper_attention, triton
from hypermlp.ops.attention import Selection
from hypermlp.ops.decode import Past, decode_block, decode_step
from hypermlp.ops.tiling import Options


class OperatorLayer(AttentionLayer):
    """Reads by ``hyper_attention``, and by its decoding forms where there is a cache."""

    def mixes(self, gates: Gates) -> tuple[SequenceMix | None, SequenceMix | None]:
        """First and second sequence mixing of the tokens with these ``gates``; here none."""
        return None, None

    @property
    def selection(self) -> Selection:
        return "glu" if self.config.num_maps == 2 else "relu"

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, attention_mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        c = self.config
        return hyper_attention(
            q, k, v, *self.mixes(gates),
            selection=self.selection, norm=c.norm, eps=c.eps, causal=c.causal, layout=c.layout, max_lag=c.max_lag,
            attention_mask=attention_mask, cu_seqlens=cu_seqlens, backend=self.backend,
        )  # fmt: skip

    def attend_step(self, q: Tensor, gates: Gates, past: Past) -> Tensor:
        mixes = self._given_mixes(gates)
        step = triton.decode_step if self.backend == "triton" else decode_step
        with _no_autocast(q.device.type):
            return step(q, past, *mixes, self._options)

    def attend_block(self, q: Tensor, gates: Gates, past: Past) -> Tensor:
        mixes = self._given_mixes(gates)
        with _no_autocast(q.device.type):
            return decode_block(q, past, *mixes, self._options)

    def _given_mixes(self, gates: Gates) -> tuple[SequenceMix, SequenceMix]:
        routing_mix, readout_mix = self.mixes(gates)
        return routing_mix or SequenceMix(), readout_mix or SequenceMix()

    @property
    def _options(self) -> Options:
        c = self.config
        return Options(self.selection, c.norm, c.eps, c.causal, c.layout, c.max_lag)


def _no_autocast(device_type: str) -> AbstractContextManager[Any]:
    # entering autocast costs as much as an operator of a single token's step
    if not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
