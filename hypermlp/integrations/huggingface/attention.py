"""A hyper layer under the calling convention of transformers' attention modules."""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypermlp.integrations.arguments import refuse_unknown
from hypermlp.integrations.huggingface.cache import HostCacheLayer, join_cache
from hypermlp.integrations.huggingface.call import call_layer
from hypermlp.integrations.huggingface.masks import document_bounds, read_mask, refuse_nested
from hypermlp.integrations.huggingface.names import IGNORED_BY_ATTENTION, one_cache
from hypermlp.layers import AttentionLayer
from hypermlp.ops.varlen import Tokens

# the others hand over no mask, or one of their own kind, even for padded batches
_READABLE = ("sdpa", "eager")


class HuggingFaceAttention(nn.Module):
    """Takes what a transformers block passes to its attention and returns ``(output, map or None)``.

    Positions that the host hands over (rotary angles) are not used: the layer knows lags.

    Args:
        mixer: the layer that computes.
        config: the host's config.
        output_dropout: probability of dropout after the output projection.
    """

    def __init__(self, mixer: AttentionLayer, config: Any, output_dropout: float = 0.0) -> None:
        nn.Module.__init__(self)  # a subclass is also the host's class, whose parts it does not make
        self.mixer, self.config = mixer, config
        self.is_causal = mixer.config.causal
        self.output_dropout = output_dropout
        # when weights are loaded, transformers starts what it takes for a host module: there is nothing of its own here
        self._is_hf_initialized = True

    @property
    def layer_idx(self) -> int | None:
        """Place in a cache, which is the layer's own: users who take layers out of a model number the rest anew."""
        return self.mixer.layer_idx

    @layer_idx.setter
    def layer_idx(self, place: int | None) -> None:
        self.mixer.layer_idx = place

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cache: Any = None,
        past_key_values: Any = None,
        layer_past: Any = None,
        output_attentions: bool | None = False,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        seq_idx: Tensor | None = None,
        is_causal: bool | None = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """``[B, T, hidden_size]`` to the same and, where asked for, maps ``[B, heads, T, S]``.

        Args:
            hidden_states: ``[B, T, hidden_size]``.
            attention_mask: as transformers makes it for sdpa and eager attention: None, or
                ``[B, 1, T, S]``, bool or additive; padding, packed documents and nothing else.
            cache, past_key_values, layer_past: a transformers cache, under the name that the release has for it.
            output_attentions: return what each head's output weighs the values by.
            cu_seq_lens_q, cu_seq_lens_k, seq_idx: packed documents, as the mask shows them too if there is one.
            is_causal: as the layer is.
            others: positions and switches that a hyper layer has no use for (:data:`IGNORED_BY_ATTENTION`).

        Raises:
            TypeError: for any other argument that is not None: it may mean something.
        """
        self._check_host()
        refuse_unknown(others, IGNORED_BY_ATTENTION, type(self).__name__, "transformers")
        refuse_nested(hidden_states=hidden_states, attention_mask=attention_mask)
        c = self.mixer.config
        if is_causal is not None and is_causal != c.causal:
            raise ValueError(f"is_causal={is_causal}, and this hyper layer was made with causal={c.causal}")
        cache = one_cache(cache=cache, past_key_values=past_key_values, layer_past=layer_past)
        new_tokens = hidden_states.shape[1]
        part = None if cache is None else join_cache(cache, self.layer_idx, new_tokens)
        if part is not None and part.unusable:
            raise RuntimeError(f"this cache holds nothing: {part.unusable}")
        first = 0 if part is None else part.first_column(new_tokens)
        told = document_bounds(hidden_states, cu_seq_lens_q, cu_seq_lens_k, seq_idx)
        tokens = read_mask(attention_mask, hidden_states, first, causal=c.causal, window=c.window, told=told)
        if part is not None and not self._cacheable(hidden_states, tokens, part):
            part = None
        want_map = self._map_wanted(output_attentions, part)
        out, weights = call_layer(self.mixer, hidden_states, tokens, part, want_map=want_map)
        return F.dropout(out, self.output_dropout, self.training), weights

    def _cacheable(self, hidden_states: Tensor, tokens: Tokens, cache: HostCacheLayer) -> bool:
        """Whether to fill the cache. Models make one even to train; it stays empty and says so if used."""
        trained = hidden_states.requires_grad or any(parameter.requires_grad for parameter in self.mixer.parameters())
        if torch.is_grad_enabled() and cache.empty and trained:
            cache.unusable = "it was passed to a call that records gradients; call under torch.no_grad()"
        elif tokens.cu_seqlens is not None:
            cache.unusable = "it was passed to a call with packed documents, which cannot be continued"
        elif not self.mixer.config.causal:
            cache.unusable = "it was passed to a bidirectional layer, whose earlier tokens would read later ones"
        return cache.unusable is None

    def _map_wanted(self, output_attentions: bool | None, cache: HostCacheLayer | None) -> bool:
        if output_attentions or getattr(self.config, "output_attentions", False):
            return True
        # some hosts keep the wish to themselves and record by a hook what eager attention always returns
        listening = self.config._attn_implementation == "eager" and bool(self._forward_hooks)
        return listening and (cache is None or cache.gives_maps)

    def _check_host(self) -> None:
        implementation = self.config._attn_implementation
        if implementation not in _READABLE:
            raise ValueError(
                f"attn_implementation={implementation!r} hands over no mask that can be read: "
                "call model.set_attn_implementation('sdpa')"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return _blank, type(self).made_from, self.__dict__  # type: ignore[attr-defined]


@cache
def attention_class(host_class: Hashable, wrapper: Hashable = HuggingFaceAttention) -> type[HuggingFaceAttention]:
    """``wrapper`` that is also a ``host_class``: transformers records outputs by class."""
    host: Any = host_class
    base: Any = wrapper
    names = {"made_from": (host, base), "__module__": __name__}
    return type(f"Hyper{host.__name__}", (base, host), names)


def _blank(host_class: Hashable, wrapper: Hashable) -> HuggingFaceAttention:
    """An empty instance, for pickle and copy: a class made at run time has no name to find it by."""
    cls = attention_class(host_class, wrapper)
    return cls.__new__(cls)
