"""``torch.nn.MultiheadAttention`` as self-attention, in ``nn.TransformerEncoder`` and ``nn.TransformerDecoder``.

In evaluation PyTorch's encoder layers read the attention's weights and never call it. What stands
in its place therefore is no ``MultiheadAttention``, and says by ``in_proj_bias = None`` and
``_qkv_same_embed_dim = False`` that there are no weights to read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from hypermlp.integrations.arguments import refuse_unknown
from hypermlp.integrations.fx import one_node
from hypermlp.integrations.host import Host, learned_positions
from hypermlp.integrations.hosts import open_clip
from hypermlp.integrations.masks import padding, trimmed, visible
from hypermlp.integrations.registry import Adapter, Stays, hold_off, path_of
from hypermlp.integrations.sites import CROSS_ATTENTION
from hypermlp.layers import AttentionLayer
from hypermlp.layers.maps import attention_map
from hypermlp.ops.modes import require


class SelfAttentionAdapter(Adapter):
    """Any ``nn.MultiheadAttention`` that is called with one tensor as query, key and value.

    Args:
        causal: default of the swap's option ``causal``.
        length: tokens it sees, by default as many as a table of learned positions around it has rows.
    """

    def __init__(self, causal: bool = False, length: int | None = None) -> None:
        self.causal, self.length = causal, length

    def at(self, model: nn.Module, name: str) -> Adapter:
        width: Any = model.get_submodule(name).embed_dim
        return SelfAttentionAdapter(self.causal, self.length or learned_positions(model, name, width))

    def skip(self, module: Any) -> str | None:
        if module.in_proj_weight is None:
            return "cross-attention: keys and values have a width of their own"
        return None

    def describe(self, module: Any) -> Host:
        # a learned or zero token that every query sees besides the others has no projection here
        plain = module.bias_k is None and not module.add_zero_attn
        return Host(
            hidden_size=module.embed_dim,
            num_heads=module.num_heads,
            causal=self.causal,
            either_way=True,
            max_length=self.length,
            projections=(lambda: open_clip.joint_projections(module, module.head_dim**-0.5)) if plain else None,
            not_offered="it adds a token to the keys (add_bias_kv, add_zero_attn)",
        )

    def wrap(self, layer: AttentionLayer, module: Any, host: Host) -> nn.Module:
        return HyperSelfAttention(layer, module.num_heads, module.batch_first)

    def finish(self, model: nn.Module, swaps: Sequence[Mapping[str, Any]]) -> None:
        """Encoders hand padded batches to their layers as nested tensors, in evaluation, unless told not to."""
        for encoder in model.modules():
            if isinstance(encoder, nn.TransformerEncoder):
                swapped = any(isinstance(module, HyperSelfAttention) for module in encoder.modules())
                hold_off(encoder, "use_nested_tensor", swapped)


class MultiheadAdapter(SelfAttentionAdapter):
    """Tells self-attention by where it stands: attributes called ``self_...``, and in the blocks of open_clip."""

    def at(self, model: nn.Module, name: str) -> Adapter:
        parent, _, leaf = name.rpartition(".")
        block: Any = model.get_submodule(parent)
        if path_of(type(block)) == open_clip.BLOCK:
            causal = open_clip.hides_later(model, name)
            return CROSS_ATTENTION if hasattr(block, "ln_1_kv") else SelfAttentionAdapter(causal).at(model, name)
        if not leaf.startswith("self"):
            return CROSS_ATTENTION if leaf in ("multihead_attn", "cross_attn", "cross_attention") else _UNCLEAR
        in_decoder = isinstance(block, nn.TransformerDecoderLayer)
        return SelfAttentionAdapter(in_decoder).at(model, name)


_UNCLEAR = Stays(
    "it may read another sequence; if query, key and value are one, "
    "adapter={nn.MultiheadAttention: hypermlp.integrations.hosts.torch_nn.SelfAttentionAdapter()}"
)


class HyperSelfAttention(nn.Module):
    """A hyper layer called as ``nn.MultiheadAttention`` is.

    Args:
        mixer: the layer that computes.
        num_heads: heads of the module it stands for, which masks for each head are made by.
        batch_first: ``[B, T, D]`` if true, else ``[T, B, D]``.
    """

    # what encoder layers ask before they read weights that are not there
    in_proj_weight = None
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, mixer: AttentionLayer, num_heads: int, batch_first: bool) -> None:
        super().__init__()
        self.mixer, self.num_heads, self.batch_first = mixer, num_heads, batch_first
        self.embed_dim = mixer.config.hidden_size

    @one_node
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        **unknown: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """``[B, T, D]``, ``[T, B, D]`` or ``[T, D]`` to the same, and the layer's maps where asked for.

        Args:
            query: the sequence; ``key`` and ``value`` must be this very tensor.
            key: see ``query``.
            value: see ``query``.
            key_padding_mask: ``[B, T]``, True or ``-inf`` for padding, whose output is zero.
            need_weights: return maps ``[B, T, T]``, of each of the layer's heads ``[B, heads, T, T]``
                if not ``average_attn_weights``; they cost a second run.
            attn_mask: ``[T, T]`` or ``[B * num_heads, T, T]``, True or ``-inf`` for what is hidden:
                causal for a causal layer, padding alone for a bidirectional one.
            average_attn_weights: see ``need_weights``.
            is_causal: says that ``attn_mask`` is causal, and may stand for it.
            unknown: anything else, which must be None.

        Raises:
            ValueError: for cross-attention, and for masks that the layer would not obey.
            TypeError: for an argument of another name.
        """
        refuse_unknown(unknown, {}, type(self).__name__, "torch")
        if key is not query or value is not query:
            raise ValueError(
                "query, key and value must be one tensor: a hyper layer reads one sequence. "
                "restore_attention(model) and leave this module out (layers=...)"
            )
        if query.is_nested:
            raise ValueError("nested tensors are not taken: set use_nested_tensor=False on the nn.TransformerEncoder")
        batched = query.ndim == 3
        x = self._batch_first(query) if batched else query[None]
        valid = trimmed(self._valid(x, key_padding_mask, attn_mask, is_causal))
        weights = attention_map(self.mixer, x, valid) if need_weights else None
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        out = self.mixer(x, valid)
        if not batched:
            return out[0], None if weights is None else weights[0]
        return self._batch_first(out), weights

    def _batch_first(self, x: Tensor) -> Tensor:
        return x if self.batch_first else x.transpose(0, 1)

    def _valid(
        self, x: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None, is_causal: bool
    ) -> Tensor | None:
        """Tokens that are no padding, bool ``[B, T]``; None for all."""
        causal = self.mixer.config.causal
        if attn_mask is None and x.shape[1] > 1 and is_causal != causal:
            given, kind = ("is_causal=True", "bidirectional") if is_causal else ("no causal mask", "causal")
            raise ValueError(f"this hyper layer is {kind} and was called with {given}: {_remedy(causal)}")
        valid = None if attn_mask is None else self._read(attn_mask, x)
        if key_padding_mask is None:
            return valid
        kept = visible(key_padding_mask, "key_padding_mask", true_hides=True)
        kept = kept if kept.ndim == 2 else kept[None]
        if kept.shape != x.shape[:2]:
            raise ValueError(
                f"key_padding_mask must be [batch, length] = {tuple(x.shape[:2])}, got {tuple(key_padding_mask.shape)}"
            )
        return kept if valid is None else kept & valid

    def _read(self, attn_mask: Tensor, x: Tensor) -> Tensor:
        config, (batch, length) = self.mixer.config, x.shape[:2]
        seen = visible(attn_mask, "attn_mask", true_hides=True)
        if seen.shape == (length, length):
            seen = seen[None]
        elif seen.shape == (batch * self.num_heads, length, length):
            heads = seen.view(batch, self.num_heads, length, length)
            seen = heads[:, 0]
            same = (heads == seen[:, None]).all()
            require(same, "attn_mask differs from head to head: a hyper layer has heads of its own")
        else:
            raise ValueError(
                f"attn_mask must be [{length}, {length}] or [{batch * self.num_heads}, {length}, {length}], "
                f"got {tuple(attn_mask.shape)}"
            )
        return padding(seen, x, config, _remedy(config.causal))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, batch_first={self.batch_first}"


def _remedy(causal: bool) -> str:
    call = "without a mask" if not causal else "with a causal mask or is_causal=True"
    return f"call it {call}, or choose swap_attention(model, causal={not causal})"


ADAPTER = MultiheadAdapter()
