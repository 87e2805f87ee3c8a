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


class Call:
    """One call of an attention layer, with Transformers' cache or with packed rows laid end to end.

    Args:
        layer: the layer.
        tokens: who is there: ``valid``, bool or integer ``[B, T]``, and bounds of packed documents in the rows laid
            end to end, not with a cache. The layer checks them.
        cache: the layer's part of a cache.
    """

    def __init__(self, layer: AttentionLayer, tokens: Tokens, cache: HostCacheLayer | None) -> None:
        self.layer, self.cache = layer, cache
        self.valid, self.cu_seqlens = tokens
        if self.valid is not None and self.cu_seqlens is not None:
            self.valid = self.valid.flatten()[None]

    def read(self, x: Tensor) -> Tensor:
        """The layer's output, ``[B, T, hidden_size]``."""
        if self.cache is not None:
            return self.cache.run(self.layer, x, self.valid)
        out: Tensor = self.layer(self._rows(x), self.valid, cu_seqlens=self.cu_seqlens)
        return out.view_as(x)

    def read_with_map(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The output and what each token reads of each token's value, ``[B, num_heads, T, keys]``.

        Where gradients are recorded those of the output pass through the map, as in softmax attention:
        ``retain_grad`` on it gives what attributions by attention maps ask for. No map for tokens that
        follow those of a static cache.
        """
        if self.cache is not None:
            return self._cached_with_map(self.cache, x)
        weights = attention_map(self.layer, self._rows(x), self.valid, cu_seqlens=self.cu_seqlens)
        if self.cu_seqlens is not None:
            batch, length = x.shape[:2]
            weights = weights.view(-1, batch, length, batch, length).diagonal(dim1=1, dim2=3).permute(3, 0, 1, 2)
        if not weights.requires_grad:
            return self.read(x), weights
        with torch.no_grad():
            out = self.read(x)
        again = through_map(self.layer, weights, self._rows(x), self.valid, cu_seqlens=self.cu_seqlens).view_as(x)
        # the layer's own numbers, and the gradients of the same numbers by way of the map
        return again + (out - again.detach()), weights

    def _cached_with_map(self, cache: HostCacheLayer, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if cache.gives_maps:
            weights = cache.map(self.layer, x, self.valid)
            return self.read(x), weights
        if not torch.compiler.is_compiling():
            logger.warning_once(
                "output_attentions: hyper layers give no maps for tokens after those of a static cache, only for the "
                "prompt; a growing cache (no cache_implementation) gives all"
            )
        return self.read(x), None

    def _rows(self, x: Tensor) -> Tensor:
        return x if self.cu_seqlens is None else x.flatten(0, 1)[None]
