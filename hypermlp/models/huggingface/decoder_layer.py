"""A block of the Hugging Face family, and what reaches it of masks and packed documents."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from hypermlp.integrations.huggingface.cache import CacheLayer, join_cache
from hypermlp.integrations.huggingface.names import one_cache
from hypermlp.layers import AttentionLayer
from hypermlp.layers.block import TransformerBlock
from hypermlp.layers.maps import attention_map
from hypermlp.models.huggingface.configuration import HyperMLPConfig


class HyperMLPDecoderLayer(GradientCheckpointingLayer, TransformerBlock):
    """A :class:`~hypermlp.layers.block.TransformerBlock` with Transformers' cache and gradient checkpointing."""

    def __init__(self, config: HyperMLPConfig, layer_idx: int) -> None:
        super().__init__(
            config.attention_config(layer_idx),
            cast(int, config.intermediate_size),
            num_layers=config.num_hidden_layers,
            norm_eps=config.rms_norm_eps,
            layer_idx=layer_idx,
        )

    def forward(  # type: ignore[override]  # called by the models below alone
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """One block over ``[B, T, hidden_size]``.

        Args:
            hidden_states: ``[B, T, hidden_size]``.
            attention_mask: 0/1 ``[B, T]``.
            cu_seqlens: bounds of packed sequences in the batch's rows laid end to end; not with a cache.
            cache: earlier tokens, which these follow and are added to; ``past_key_values`` is its older name.
            output_attentions: return the attention map too.

        Returns:
            ``[B, T, hidden_size]``, or that and a map ``[B, num_heads, T, keys]``.
        """
        x = self.attention_norm(hidden_states)
        cache = one_cache(cache=cache, past_key_values=past_key_values)
        part = None if cache is None else join_cache(cache, self.attention.layer_idx, x.shape[1])
        attention = _Attention(self.attention, attention_mask, cu_seqlens, part)
        weights = attention.map(x) if output_attentions else None
        hidden_states = hidden_states + attention.read(x)
        out: Tensor = hidden_states + self.mlp(self.mlp_norm(hidden_states))
        return out if weights is None else (out, weights)


class _Attention:
    """One call of an attention layer, with Transformers' cache or with packed rows laid end to end."""

    def __init__(
        self, layer: AttentionLayer, mask: Tensor | None, cu_seqlens: Tensor | None, cache: CacheLayer | None
    ) -> None:
        self.layer, self.cu_seqlens, self.cache = layer, cu_seqlens, cache
        self.mask = mask if mask is None or cu_seqlens is None else mask.flatten()[None]

    def read(self, x: Tensor) -> Tensor:
        """The layer's output, ``[B, T, hidden_size]``."""
        if self.cache is not None:
            return self.cache.run(self.layer, x, self.mask)
        out: Tensor = self.layer(self._rows(x), self.mask, cu_seqlens=self.cu_seqlens)
        return out.view_as(x)

    def map(self, x: Tensor) -> Tensor:
        """What each token reads of each token's value, ``[B, num_heads, T, keys]``, before the layer is run."""
        if self.cache is not None:
            return self.cache.map(self.layer, x, self.mask)
        weights = attention_map(self.layer, self._rows(x), self.mask, cu_seqlens=self.cu_seqlens)
        if self.cu_seqlens is None:
            return weights
        batch, length = x.shape[:2]
        blocks = weights.view(-1, batch, length, batch, length).diagonal(dim1=1, dim2=3)
        return blocks.permute(3, 0, 1, 2)

    def _rows(self, x: Tensor) -> Tensor:
        return x if self.cu_seqlens is None else x.flatten(0, 1)[None]


def mask_of_new_tokens(attention_mask: Tensor, new_tokens: int, cache: Cache | None) -> Tensor:
    """The part ``[B, T]`` of a mask over the new tokens, or over all of them, that is about the new ones."""
    if attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask must be 0/1 [batch, length], got shape {tuple(attention_mask.shape)}: "
            "for packed documents pass position_ids or cu_seq_lens_q"
        )
    columns = attention_mask.shape[1]
    if columns != new_tokens and not torch.compiler.is_compiling():
        past = 0 if cache is None else int(cache.get_seq_length())
        if columns != past + new_tokens:
            raise ValueError(
                f"attention_mask must count the {new_tokens} new tokens or all {past + new_tokens}, got {columns}"
            )
    return attention_mask[:, -new_tokens:]


def packed_bounds(position_ids: Tensor) -> Tensor | None:
    """Bounds of the documents in the batch's rows laid end to end, int64 ``[N + 1]``; None if each row is one.

    Args:
        position_ids: ``[B, T]``; a document begins where a number does not follow the one before it.
    """
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids.diff(dim=-1) != 1
    if not bool(begins[:, 1:].any()):
        return None
    starts = begins.flatten().nonzero().flatten()
    return torch.cat((starts, starts.new_tensor([begins.numel()])))
