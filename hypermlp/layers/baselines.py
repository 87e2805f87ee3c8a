"""Baselines with the constructor and the forward of the hyper layers, for fair comparison."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from hypermlp.config import Mixer
from hypermlp.layers.base import AttentionLayer
from hypermlp.layers.feature_mixing import Gates
from hypermlp.layers.operator_layer import OperatorLayer
from hypermlp.ops.decode import Past
from hypermlp.ops.varlen import Tokens, key_spans


class SoftmaxAttention(AttentionLayer):
    """Multi-head softmax attention through ``torch.nn.functional.scaled_dot_product_attention``.

    Plain by default, ``4 * hidden_size^2`` parameters; rotation, convolutions and gates are the
    hyper layers' own, so that a comparison changes one thing at a time.

    Shape:
        ``[B, T, hidden_size]`` to ``[B, T, hidden_size]``.
    """

    mixer: ClassVar[Mixer] = "softmax"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, tokens: Tokens) -> Tensor:
        causal = self.config.causal
        # causal of PyTorch's counts queries from the first key
        plain = q.shape[1] == k.shape[1] and tokens.one_sequence_a_row and (self.config.max_lag is None or not causal)
        visible = None if plain else self._visible(q.shape[1], k.shape[1], tokens, q.device)
        q, k, v = (rearrange(y, "b t h k -> b h t k") for y in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=plain and causal)
        return rearrange(o, "b h t v -> b t h v")

    def attend_step(self, q: Tensor, gates: Gates, past: Past) -> Tensor:
        batch = q.shape[0]
        keys, values = _joined(past, batch, self.config.num_heads)
        q = q.reshape(batch, self.config.num_heads, 1, self.config.qk_width)
        visible = None if past.valid is None else past.valid[:, None, None]
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=visible).flatten(1)

    def attend_block(self, q: Tensor, gates: Gates, past: Past) -> Tensor:
        keys, values = _joined(past, q.shape[0], q.shape[2])
        visible = self._visible(q.shape[1], keys.shape[2], Tokens(past.valid), q.device)
        return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=visible).transpose(1, 2)

    def _visible(self, new: int, length: int, tokens: Tokens, device: torch.device) -> Tensor:
        """Bool ``[B or 1, 1, new, T]`` of the last ``new`` tokens. Every query sees itself, so that no row is empty."""
        start, stop = key_spans(
            length, causal=self.config.causal, max_lag=self.config.max_lag, cu_seqlens=tokens.cu_seqlens, device=device
        )
        keys = torch.arange(length, device=device)
        own = slice(length - new, length)
        visible = ((keys >= start[own, None]) & (keys < stop[own, None]))[None, None]
        if tokens.valid is not None:
            visible = visible & tokens.valid[:, None, None]
        return visible | (keys == keys[own, None])


def _joined(past: Past, batch: int, heads: int) -> list[Tensor]:
    """Keys and values of all slots, ``[B, H, n, width]``: a copy only where they are in several segments."""
    joined = (part[0] if len(part) == 1 else torch.cat(list(part), dim=1) for part in (past.keys, past.values))
    return [part.view(batch, heads, *part.shape[1:]) for part in joined]


class ReLUAttention(OperatorLayer, SoftmaxAttention):
    """ReLU attention with L2 normalisation: HyperMLP without sequence mixing.

    Plain by default, as :class:`SoftmaxAttention`; ``norm`` and ``eps`` as in :class:`~hypermlp.HyperMLP`.
    """

    mixer: ClassVar[Mixer] = "relu"
