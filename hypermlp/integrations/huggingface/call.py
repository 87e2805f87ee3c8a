"""One call of a hyper layer as transformers makes it: with its cache, with packed rows, with a map asked for."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.utils import logging

from hypermlp.integrations.huggingface.cache import HostCacheLayer
from hypermlp.layers import AttentionLayer
from hypermlp.layers.maps import attention_map, through_map
from hypermlp.ops.varlen import Tokens

logger = logging.get_logger(__name__)


def call_layer(
    layer: AttentionLayer, x: Tensor, tokens: Tokens, cache: HostCacheLayer | None, *, want_map: bool
) -> tuple[Tensor, Tensor | None]:
    """One call of an attention layer, with Transformers' cache or with packed rows laid end to end.

    Args:
        layer: the layer, which checks all that it is given.
        x: ``[B, T, hidden_size]``.
        tokens: who is there: ``valid``, bool or integer ``[B, T]``, and bounds of packed documents in the rows laid
            end to end, not with a cache.
        cache: the layer's part of a cache.
        want_map: whether the second result is wanted.

    Returns:
        The output, ``[B, T, hidden_size]``, and the map, ``[B, num_heads, T, keys]``: what each token reads of each
        token's value. Where gradients are recorded those of the output pass through it, as in softmax attention:
        ``retain_grad`` on it gives what attributions by attention maps ask for. There is none for tokens that follow
        those of a static cache.
    """
    valid, cu_seqlens = tokens
    if cache is not None:
        weights = _map_with_cache(cache, layer, x, valid) if want_map else None
        return cache.run(layer, x, valid), weights
    rows = x
    if cu_seqlens is not None:
        rows, valid = x.flatten(0, 1)[None], None if valid is None else valid.flatten()[None]

    def read() -> Tensor:
        out: Tensor = layer(rows, valid, cu_seqlens=cu_seqlens)
        return out.view_as(x)

    if not want_map:
        return read(), None
    weights = attention_map(layer, rows, valid, cu_seqlens=cu_seqlens)
    if cu_seqlens is not None:
        batch, length = x.shape[:2]
        weights = weights.view(-1, batch, length, batch, length).diagonal(dim1=1, dim2=3).permute(3, 0, 1, 2)
    if not weights.requires_grad:
        return read(), weights
    with torch.no_grad():
        out = read()
    again = through_map(layer, weights, rows, valid, cu_seqlens=cu_seqlens).view_as(x)
    # the layer's own numbers, and the gradients of the same numbers by way of the map
    return again + (out - again.detach()), weights


def _map_with_cache(cache: HostCacheLayer, layer: AttentionLayer, x: Tensor, valid: Tensor | None) -> Tensor | None:
    if cache.gives_maps:
        return cache.map(layer, x, valid)
    if not torch.compiler.is_compiling():
        logger.warning_once(
            "output_attentions: hyper layers give no maps for tokens after those of a static cache, only for the "
            "prompt; a growing cache (no cache_implementation) gives all"
        )
    return None
