"""A block of the Hugging Face family, and what reaches it of masks and packed documents."""

from __future__ import annotations

from typing import cast

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from hypermlp.integrations.huggingface.cache import join_cache
from hypermlp.integrations.huggingface.call import call_layer
from hypermlp.integrations.huggingface.masks import begins_where, bounds_of
from hypermlp.integrations.huggingface.names import one_cache
from hypermlp.layers.block import TransformerBlock
from hypermlp.models.huggingface.configuration import HyperMLPConfig
from hypermlp.ops.modes import require, values_readable
from hypermlp.ops.varlen import Tokens, newest


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
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """One block over ``[B, T, hidden_size]``.

        Args:
            hidden_states: ``[B, T, hidden_size]``.
            attention_mask: 0/1 ``[B, T]``.
            cu_seqlens: bounds of packed sequences in the batch's rows laid end to end; not with a cache.
            cache: earlier tokens, which these follow and are added to; ``past_key_values`` is its older name.
            output_attentions: return the attention map too.

        Returns:
            ``[B, T, hidden_size]``, or that and a map ``[B, num_heads, T, keys]`` (None after a static cache's tokens).
        """
        x = self.attention_norm(hidden_states)
        cache = one_cache(cache=cache, past_key_values=past_key_values)
        if cache is not None and cu_seqlens is not None:
            raise ValueError("cu_seqlens: packed sequences cannot be continued, so they go without a cache")
        part = None if cache is None else join_cache(cache, self.attention.layer_idx, x.shape[1])
        tokens = Tokens(attention_mask, cu_seqlens)
        read, weights = call_layer(self.attention, x, tokens, part, want_map=output_attentions)
        hidden_states = hidden_states + read
        out: Tensor = hidden_states + self.mlp(self.mlp_norm(hidden_states))
        return (out, weights) if output_attentions else out


def mask_of_new_tokens(attention_mask: Tensor, new_tokens: int, cache: Cache | None) -> Tensor:
    """The part ``[B, T]`` of a mask over the new tokens, or over all of them, that is about the new ones."""
    if attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask must be 0/1 [batch, length], got shape {tuple(attention_mask.shape)}: "
            "for packed documents pass position_ids or cu_seq_lens_q"
        )
    past = 0 if cache is None else cache.get_seq_length()
    readable = not isinstance(past, Tensor) or values_readable(past, wait=True)
    return newest(_exact(attention_mask), new_tokens, int(past) if readable else None)


def _exact(attention_mask: Tensor) -> Tensor:
    """A mask of floats 0 and 1, as PEFT's prompt tuning makes it, as bool. One of zeros alone might be additive."""
    if not attention_mask.is_floating_point():
        return attention_mask
    ones = attention_mask == 1
    require(
        ((attention_mask == 0) | ones).all() & ones.any(1).all(),
        "attention_mask: of floats only 0 for padding and 1 for tokens are taken, with a 1 in every row: additive "
        "masks are not, pass which tokens are valid",
    )
    return ones


def packed_bounds(position_ids: Tensor) -> Tensor | None:
    """Bounds of the documents in the batch's rows laid end to end, see :func:`bounds_of`; None if each row is one.

    Args:
        position_ids: ``[B, T]``; a document begins where a number does not follow the one before it.
    """
    begins = begins_where(position_ids, 1)
    if values_readable(position_ids, wait=True) and not bool(begins[:, 1:].any()):
        return None
    return bounds_of(begins)
