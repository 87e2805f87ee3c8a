"""What each token's output weighs the values by: the map that softmax attention would call its weights."""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from hypermlp.cache import HyperCache, LayerCache
from hypermlp.checks import check_kind
from hypermlp.layers.base import AttentionLayer
from hypermlp.ops.varlen import zero_padded


def attention_map(
    layer: AttentionLayer,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    cache: HyperCache | None = None,
) -> Tensor:
    """The effective map of a layer, ``[B, heads, T, S]``: what a token's output reads of each token's value.

    A head's output is linear in its values, so reading the unit vectors in their place gives the
    map, on every path; a masked token has zeros, as its value has. Of a hyper layer it includes
    both mixings and the norm; rows do not add up to one and may have negative entries. The output
    gate comes after it.

    Args:
        layer: the layer.
        hidden_states: ``[B, T, hidden_size]``.
        attention_mask: as in the layer's forward.
        cu_seqlens: likewise.
        cache: earlier tokens, which stay as they are; the map has columns for them too.

    Raises:
        ValueError: for a static cache that holds tokens.
    """
    check_kind("layer", layer, AttentionLayer)
    part = None if cache is None else layer.cache_part(cache)
    tokens = layer.tokens(hidden_states, attention_mask, cu_seqlens, part)
    x = tokens.zeroed(hidden_states)
    batch, length = x.shape[:2]
    if part is None or part.empty:
        if not length:
            return x.new_zeros(batch, layer.config.num_heads, 0, 0)
        q, k, v, gates = layer.streams(x, tokens)
        unit = tokens.masked_zeroed(_unit(v, length).transpose(1, 2))
        return layer.attend(q, k, unit, gates, tokens).transpose(1, 2)
    if not isinstance(part, LayerCache):
        raise ValueError("a map over earlier tokens needs a growing cache: this one is static")
    q, k, v, gates = layer.streams(x, tokens, part)
    past = part.extended(k, v, tokens.valid)
    bounds = list(accumulate((values.shape[1] for values in past.values), initial=0))
    unit = zero_padded(_unit(v, bounds[-1]).transpose(1, 2), past.valid).transpose(1, 2).flatten(0, 1)
    past = past._replace(values=[unit[:, start:stop] for start, stop in pairwise(bounds)])
    weights = layer.attend_block(q, gates, past).transpose(1, 2)
    return F.pad(weights, (part.length + length - bounds[-1], 0))  # zeros for tokens before the window


def through_map(
    layer: AttentionLayer,
    weights: Tensor,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The layer's output, ``[B, T, hidden_size]``, by way of its map.

    Args:
        layer: the layer.
        weights: its map, ``[B, heads, T, T]``; or with packed sequences in rows of one length, that of each row.
        hidden_states: ``[B, T, hidden_size]``, the rows laid end to end where ``weights`` is of several.
        attention_mask, cu_seqlens: as for the map.
    """
    tokens = layer.tokens(hidden_states, attention_mask, cu_seqlens)
    x = tokens.zeroed(hidden_states)
    _, _, v, gates = layer.streams(x, tokens)
    rows = v.reshape(weights.shape[0], weights.shape[-1], *v.shape[2:])
    read = torch.einsum("bhts,bshv->bthv", weights, rows).reshape(*x.shape[:2], -1)
    return tokens.zeroed(layer.output(read, gates))


def _unit(v: Tensor, count: int) -> Tensor:
    """``[B, heads, count, count]``, the identity in the place of values like ``v`` ``[B, T, heads, width]``."""
    return torch.eye(count, dtype=v.dtype, device=v.device).expand(v.shape[0], v.shape[2], -1, -1)
