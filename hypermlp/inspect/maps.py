"""The maps of one call of a layer, by lag, from the equations."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hypermlp.checks import check_kind
from hypermlp.inspect.record import LayerCall
from hypermlp.layers.base import AttentionLayer
from hypermlp.layers.maps import attention_map
from hypermlp.layers.operator_layer import OperatorLayer
from hypermlp.layers.streams import Streams
from hypermlp.ops import SequenceMix
from hypermlp.ops.arguments import OperatorArgs, Options
from hypermlp.ops.lag_layout import columns_to_keys
from hypermlp.ops.reference import dense_maps
from hypermlp.ops.varlen import Tokens, key_spans, zero_padded

# of one layer's maps: more is no text to look at
_MOST_BYTES = 8 << 30
# maps of the size of the scores that are alive at once
_COPIES = 8


class HeadMaps(NamedTuple):
    """What the heads of a layer do with each token of a text, in float32 or better.

    Column ``c`` of a map is lag ``c``; of a layer by position it is the key ``c`` places after the sequence's first
    valid token. There are ``n`` columns: ``T``, or the window where that is less. ``H`` is the number of heads, ``S``
    that of score maps a head (gate maps come first), ``R`` the rank.

    Attributes:
        weights: ``w``, ``[B, H, T, n]``: what a token's output weighs the values by. Zero where nothing is seen.
        active: ``a``, ``[B, H, T, n]``: what the selection leaves, divided by the norm. None for softmax, which selects
            nothing.
        visible: bool ``[B, 1, T, n]``: whether token and key are there, and the one may see the other.
        distance: int64 ``[B, 1, T, n]``: tokens from the key to the query, 0 for the token itself; means nothing where
            nothing is seen.
        z1: ``[B, T, S*H, R]``, what the first mixing's low-rank term reads of the scores; None where there is none.
        z2: ``[B, T, H, R]``, what the second one's reads of ``active``; None likewise.
        routing_mix: the first sequence mixing, with these tokens' cores ``[B, T, S*H, R]``; None where there is none.
        readout_mix: the second one, likewise, with ``[B, T, H, R]``.
    """

    weights: Tensor
    active: Tensor | None
    visible: Tensor
    distance: Tensor
    z1: Tensor | None
    z2: Tensor | None
    routing_mix: SequenceMix | None
    readout_mix: SequenceMix | None

    @property
    def valid(self) -> Tensor:
        """Tokens that see anything, bool ``[B, T]``."""
        return self.visible.any(-1).squeeze(1)


@torch.no_grad()
def head_maps(call: LayerCall) -> HeadMaps:
    """The maps of a recorded call.

    Those of a hyper or ReLU layer are of the dense reference path, whichever path the layer takes.

    Args:
        call: as :func:`record` gives it.

    Raises:
        ValueError: there are no tokens, or the maps would take more than 8 GiB.
    """
    check_kind("call", call, LayerCall, "one of those that hypermlp.inspect.record(model, ...) gives")
    layer, x = call.layer, call.hidden_states
    _check_size(layer, x)
    tokens = layer.tokens(x, call.attention_mask, call.cu_seqlens)
    x = tokens.zeroed(x)
    streams = layer.streams(x, tokens)
    maps = _of_operator(layer, streams, tokens) if isinstance(layer, OperatorLayer) else _of_softmax(call, tokens)
    # a padded token has a query where projections have biases, and with softmax it sees itself
    there = tokens.zeroed(x.new_ones(x.shape[:2])).bool()
    visible = maps.visible & there[:, None, :, None]
    return maps._replace(
        weights=torch.where(visible, maps.weights, 0),
        active=None if maps.active is None else torch.where(visible, maps.active, 0),
        visible=visible,
        distance=maps.distance.expand(visible.shape),
        z1=None if maps.z1 is None else zero_padded(maps.z1, there),
        z2=None if maps.z2 is None else zero_padded(maps.z2, there),
    )


def _of_operator(layer: OperatorLayer, streams: Streams, tokens: Tokens) -> HeadMaps:
    q, k, v, gates = streams
    dtype = torch.promote_types(q.dtype, torch.float32)
    x = OperatorArgs(q, k, v, *layer.mixes(q, gates), tokens, layer._options).map_streams(lambda y: y.to(dtype))
    maps = dense_maps(x, x.spans())
    active, weights, z1, z2 = maps.active, maps.weights, maps.z1, maps.z2
    if maps.norm is not None:
        active, weights = active / maps.norm, weights / maps.norm
        z2 = None if z2 is None else z2 / maps.norm
    z1, z2 = (None if z is None else z.transpose(1, 2) for z in (z1, z2))
    mixes = (None if mix.identity and mix.rank == 0 and mix.diag is None else mix for mix in x[3:5])
    return HeadMaps(weights, active, maps.visible, _distance(maps.keys), z1, z2, *mixes)


def _of_softmax(call: LayerCall, tokens: Tokens) -> HeadMaps:
    config, length, device = call.layer.config, call.hidden_states.shape[1], call.hidden_states.device
    span = key_spans(length, causal=config.causal, max_lag=config.window, cu_seqlens=tokens.cu_seqlens, device=device)
    options = Options("relu", config.norm, config.eps, config.causal, config.layout, config.window)
    keys, visible = columns_to_keys(*span, options, tokens)
    weights = attention_map(call.layer, call.hidden_states, call.attention_mask, cu_seqlens=call.cu_seqlens)
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    weights = weights.gather(-1, keys.expand(*weights.shape[:2], -1, -1))
    return HeadMaps(weights, None, visible, _distance(keys), None, None, None, None)


def _distance(keys: Tensor) -> Tensor:
    return (torch.arange(keys.shape[-2], device=keys.device)[:, None] - keys).abs()


def _check_size(layer: AttentionLayer, x: Tensor) -> None:
    config = layer.config
    batch, length = x.shape[:2]
    if not length:
        raise ValueError(f"the call's hidden_states {tuple(x.shape)} have no tokens: give a text of one or more")
    columns = length if config.max_lag is None else min(length, config.max_lag)
    cells = batch * config.num_maps * config.num_heads * length * columns
    size = _COPIES * cells * max(4, x.element_size())
    if size > _MOST_BYTES:
        raise ValueError(
            f"maps of {batch} x {length} tokens would take {size / 2**30:,.0f} GiB a layer: give a shorter text, "
            "or fewer rows at a time"
        )
