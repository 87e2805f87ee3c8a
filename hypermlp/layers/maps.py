"""What each token's output weighs the values by: the map that softmax attention would call its weights."""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from hypermlp.cache import HyperCache, LayerCache
from hypermlp.layers.base import AttentionLayer
from hypermlp.ops.checks import check_attention_mask
from hypermlp.ops.varlen import within_bounds, zero_padded


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
    map, on every path. Of a hyper layer it includes both mixings and the norm; rows do not add up
    to one and may have negative entries. The output gate comes after it.

    Args:
        layer: the layer.
        hidden_states: ``[B, T, hidden_size]``.
        attention_mask: as in the layer's forward.
        cu_seqlens: likewise.
        cache: earlier tokens, which stay as they are; the map has columns for them too.

    Raises:
        ValueError: for a static cache that holds tokens.
    """
    state = None if cache is None else layer.cache_part(cache)
    if state is None or state.empty:
        batch, length = hidden_states.shape[:2]
        if not length:
            return hidden_states.new_zeros(batch, layer.config.num_heads, 0, 0)
        valid = None if attention_mask is None else check_attention_mask(attention_mask, hidden_states)
        inside = within_bounds(hidden_states.shape[1], cu_seqlens, hidden_states.device)
        x = zero_padded(zero_padded(hidden_states, valid), inside)
        offset = layer._rotary_offset(x, valid, cu_seqlens)
        gates = layer.gates(x)
        k, v = layer.keys_values(x, cu_seqlens, offset)
        unit = _unit(v, x.shape[1]).transpose(1, 2)
        return layer.attend(layer.queries(x, gates, offset), k, unit, gates, valid, cu_seqlens).transpose(1, 2)
    if not isinstance(state, LayerCache):
        raise ValueError("a map over earlier tokens needs a growing cache: this one is static")
    valid = layer._new_tokens_mask(attention_mask, hidden_states, state)
    x = zero_padded(hidden_states, valid)
    offset = state.offset(valid)
    gates = layer.gates(x)
    k, v = (zero_padded(part, valid) for part in layer.keys_values(x, None, offset, past=state.inputs(x)))
    past = state.extended(k, v, valid)
    bounds = list(accumulate((part.shape[1] for part in past.values), initial=0))
    unit = _unit(v, bounds[-1]).flatten(0, 1)
    values = [unit[:, start:stop] for start, stop in pairwise(bounds)]
    weights = layer.attend_block(layer.queries(x, gates, offset), gates, past._replace(values=values)).transpose(1, 2)
    # tokens before the window
    return F.pad(weights, (state.length + x.shape[1] - bounds[-1], 0))


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
    valid = None if attention_mask is None else check_attention_mask(attention_mask, hidden_states)
    inside = within_bounds(hidden_states.shape[1], cu_seqlens, hidden_states.device)
    x = zero_padded(zero_padded(hidden_states, valid), inside)
    gates = layer.gates(x)
    _, v = layer.keys_values(x, cu_seqlens, layer._rotary_offset(x, valid, cu_seqlens))
    rows = v.reshape(weights.shape[0], weights.shape[-1], *v.shape[2:])
    read = torch.einsum("bhts,bshv->bthv", weights, rows).reshape(*x.shape[:2], -1)
    return zero_padded(zero_padded(layer.output(read, gates), valid), inside)


def _unit(v: Tensor, count: int) -> Tensor:
    """``[B, heads, count, count]``, the identity in the place of values like ``v`` ``[B, T, heads, width]``."""
    return torch.eye(count, dtype=v.dtype, device=v.device).expand(v.shape[0], v.shape[2], -1, -1)
