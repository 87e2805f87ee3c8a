"""Layers of a transformers cache that hold a hyper layer's part: :class:`~hypermlp.HyperCache` does the work.

A cache made by transformers has layers of its own kinds. The first time a hyper layer meets an
empty one it puts the matching kind from here in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from hypermlp.cache import HyperCache
from hypermlp.layers import AttentionLayer
from hypermlp.layers.maps import attention_map
from hypermlp.ops.modes import values_readable

_NO_LIMIT = 1 << 62


class HostCacheLayer:
    """What all kinds share. Which tokens are there, and how masks stand to them, the host's kind says."""

    memory: HyperCache
    layer_idx: int
    unusable: str | None = None
    get_mask_sizes: Callable[[int], tuple[int, int]]

    def _start(self, layer_idx: int, memory: HyperCache) -> None:
        self.layer_idx, self.memory = layer_idx, memory

    def first_column(self, new_tokens: int) -> int | Tensor:
        """Column of the first new token in the masks that transformers makes with this layer."""
        return self.get_seq_length() - self.get_mask_sizes(new_tokens)[1]

    @property
    def empty(self) -> bool:
        part = self.memory.layers.get(self.layer_idx)
        return part is None or part.empty

    @property
    def gives_maps(self) -> bool:
        """Whether :meth:`map` can be made now."""
        return self.empty or not self.memory.static

    def run(self, mixer: AttentionLayer, hidden_states: Tensor, valid: Tensor | None) -> Tensor:
        """The layer over new tokens, which are taken in."""
        out: Tensor = mixer(hidden_states, valid, cache=self.memory)
        self._count(hidden_states.shape[1])
        return out

    def map(self, mixer: AttentionLayer, hidden_states: Tensor, valid: Tensor | None) -> Tensor:
        """The layer's map over all tokens, the new ones included, which are not taken in."""
        return attention_map(mixer, hidden_states, valid, cache=self.memory)

    def _count(self, new_tokens: int) -> None:
        self.is_initialized = True

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            f"layer {self.layer_idx} of this cache was filled by a hyper layer: another one cannot use it"
        )

    def get_seq_length(self) -> int | Tensor:
        return self.memory.get_seq_length(self.layer_idx)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.memory.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.memory.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.memory.repeat(repeats)

    def crop(self, tokens: int) -> None:
        """Drop ``-tokens`` of the newest; a positive number is how many to keep, as transformers < 5.14 had it."""
        length = self.memory.get_seq_length(self.layer_idx)
        keep = min(tokens, length) if tokens > 0 else length + tokens
        if not self.empty and keep < length:
            self.memory.crop(keep)

    def reset(self) -> None:
        self.memory.reset()
        self.unusable = None

    def offload(self) -> None:
        self.memory.to("cpu")

    def prefetch(self) -> None:
        raise RuntimeError("hyper layers do not offload their cache")


class HyperDynamicLayer(HostCacheLayer, DynamicLayer):  # type: ignore[misc]
    """Grows with the tokens, up to the layer's window."""

    def __init__(self, host: DynamicLayer, layer_idx: int) -> None:
        DynamicLayer.__init__(self)
        self._start(layer_idx, HyperCache())


class HyperSlidingLayer(HostCacheLayer, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """The same under masks that show a sliding window alone."""

    def __init__(self, host: DynamicSlidingWindowLayer, layer_idx: int) -> None:
        DynamicSlidingWindowLayer.__init__(self, sliding_window=host.sliding_window)
        self._start(layer_idx, HyperCache())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        self.cumulative_length = self.memory.get_seq_length(self.layer_idx)
        sizes: tuple[int, int] = super().get_mask_sizes(query_length)
        return sizes


class HyperStaticLayer(HostCacheLayer, StaticLayer):  # type: ignore[misc]
    """Memory of one size; the count of tokens is a tensor, so that a step compiles once."""

    cumulative_length: Tensor

    def __init__(self, host: StaticLayer, layer_idx: int) -> None:
        StaticLayer.__init__(self, max_cache_len=host.max_cache_len)
        self._start(layer_idx, HyperCache(static=True, max_length=host.max_cache_len))

    def get_seq_length(self) -> int | Tensor:
        # a copy: transformers keeps what it is given, and the counter goes on
        return self.cumulative_length.clone() if self.is_initialized else 0

    def run(self, mixer: AttentionLayer, hidden_states: Tensor, valid: Tensor | None) -> Tensor:
        """One token at a time after the first call: a step's memory is of one size."""
        if not self.is_initialized:
            self.cumulative_length = self.cumulative_length.to(hidden_states.device)
            # the second is its name in transformers 5.5, which asks before it takes a cache again
            self.batch_size = self.max_batch_size = hidden_states.shape[0]
        length = hidden_states.shape[1]
        if self.empty or length == 1:
            return super().run(mixer, hidden_states, valid)
        out = []
        for token in range(length):
            now = None if valid is None else valid[:, token : token + 1]
            out.append(super().run(mixer, hidden_states[:, token : token + 1], now))
        return torch.cat(out, dim=1)

    def _count(self, new_tokens: int) -> None:
        super()._count(new_tokens)
        self.cumulative_length.add_(new_tokens)

    def reset(self) -> None:
        super().reset()
        self.cumulative_length.zero_()


class HyperStaticSlidingLayer(HyperStaticLayer, StaticSlidingWindowLayer):  # type: ignore[misc]
    """The same where the host slides a window: the layer's own window bounds its memory."""

    def __init__(self, host: StaticSlidingWindowLayer, layer_idx: int) -> None:
        StaticSlidingWindowLayer.__init__(self, host.max_cache_len, host.max_cache_len)
        self._start(layer_idx, HyperCache(static=True, max_length=_NO_LIMIT))

    def get_seq_length(self) -> int:
        return self.cumulative_length_int

    def _count(self, new_tokens: int) -> None:
        super()._count(new_tokens)
        self.cumulative_length_int += new_tokens

    def reset(self) -> None:
        super().reset()
        self.cumulative_length_int = 0


_KINDS: dict[type, Any] = {
    DynamicLayer: HyperDynamicLayer,
    DynamicSlidingWindowLayer: HyperSlidingLayer,
    StaticLayer: HyperStaticLayer,
    StaticSlidingWindowLayer: HyperStaticSlidingLayer,
}


def join_cache(cache: Any, layer_idx: int | None, new_tokens: int) -> HostCacheLayer:
    """The part of ``cache`` for layer ``layer_idx``, of a kind that hyper layers can use.

    Args:
        cache: what came under one of the cache's names.
        layer_idx: the layer's place in it.
        new_tokens: how many it is about to take in.

    Raises:
        ValueError, TypeError: for a cache of a kind that cannot be used, filled by another layer, or a layer
            that would be used twice in one step.
    """
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    check_cache(cache)
    if layer_idx is None:
        raise ValueError("a cache needs a place in it: this module was made without layer_idx")
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= layer_idx:
            cache.layers.append(cache.layer_class_to_replicate())
    if layer_idx >= len(cache.layers):
        raise ValueError(
            f"this cache has {len(cache.layers)} layers, none for layer_idx={layer_idx}: where layers were taken out "
            "of a model, number the others anew (layer.self_attn.layer_idx = 0, 1, ...)"
        )
    found = cache.layers[layer_idx]
    if isinstance(found, HostCacheLayer):
        _refuse_second_use(cache.layers, layer_idx, new_tokens)
        return found
    kind = _KINDS.get(type(found))
    if kind is None or cache.offloading:
        what = "offloaded" if cache.offloading else type(found).__name__
        raise ValueError(
            f"hyper layers cannot use this cache ({what}): use a DynamicCache or a StaticCache without offloading"
        )
    if int(found.get_seq_length()) > 0:
        raise ValueError(
            f"layer {layer_idx} of the cache was filled by something else than a hyper layer (attention before a swap, "
            "or PEFT's prefix tuning), which keeps more than keys and values. Start with a new cache; of PEFT's "
            "virtual tokens take prompt tuning, which goes by way of the embeddings"
        )
    cache.layers[layer_idx] = kind(found, layer_idx)
    joined: HostCacheLayer = cache.layers[layer_idx]
    return joined


def check_cache(cache: Any) -> None:
    """TypeError for anything but a cache of transformers."""
    if not isinstance(cache, Cache):
        raise TypeError(
            f"the cache must be a transformers Cache, got {type(cache).__name__}: use DynamicCache(config=model.config)"
        )


def _refuse_second_use(layers: list[Any], layer_idx: int, new_tokens: int) -> None:
    """ValueError where a layer's tokens do not stand to those of other layers as in the order of one step.

    In a step the layers before this one have taken the new tokens in, those after it have not. Where nothing can be
    compared (a single layer; static caches on a GPU or in a graph, whose counts are no numbers here) nothing is found.
    """
    if torch.compiler.is_compiling():
        return
    seen = _count(layers[layer_idx])
    if not seen:
        return
    before = _count(layers[layer_idx - 1]) if layer_idx else None
    after = {_count(layers[place]) for place in (layer_idx + 1, len(layers) - 1) if layer_idx < place < len(layers)}
    if (before and before != seen + new_tokens) or after - {None, seen}:
        raise ValueError(
            f"layer {layer_idx} of this cache holds {seen} tokens and would be filled a second time in one step, while "
            "others wait: a cache has one place for each layer. Are weights shared over depths, was a layer copied "
            "with its layer_idx, or were layers taken out (then set config.num_hidden_layers)?"
        )


def _count(layer: Any) -> int | None:
    """Tokens that a layer of a cache has seen; None where that is no number, or it takes none."""
    if getattr(layer, "unusable", None) is not None or not isinstance(layer, (DynamicLayer, StaticLayer)):
        return None
    count = layer.get_seq_length()
    if isinstance(count, Tensor):
        return int(count) if values_readable(count) else None
    return int(count)
