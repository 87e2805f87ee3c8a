"""x-transformers: attention with some twenty keywords, which returns a record of itself beside its output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from hypermlp.integrations.arguments import refuse_unknown
from hypermlp.integrations.fx import one_node
from hypermlp.integrations.host import Host
from hypermlp.integrations.masks import padding, trimmed, visible
from hypermlp.integrations.registry import Adapter, SizedAdapter, Stays, hold_off
from hypermlp.integrations.sites import CROSS
from hypermlp.layers import AttentionLayer

_POSITIONS = "positions, which a hyper layer's tables know by themselves"
_IGNORED = dict.fromkeys(("rel_pos", "rotary_pos_emb", "polar_pos_emb", "pos"), _POSITIONS)


class XTransformersAttention(nn.Module):
    """A hyper layer called as x-transformers' ``Attention`` is.

    Args:
        mixer: the layer that computes.
        dropout: probability of dropout after the output projection.
    """

    # what a model asks of its attention before it generates
    can_cache_kv = False

    def __init__(self, mixer: AttentionLayer, dropout: float = 0.0) -> None:
        super().__init__()
        self.mixer, self.sublayer_dropout = mixer, nn.Dropout(dropout)

    @one_node
    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        return_intermediates: bool = False,
        causal: bool | None = None,
        **unknown: Any,
    ) -> Any:
        """``[B, N, dim]`` to the same, and an empty record where one is asked for.

        Args:
            x: the sequence.
            mask: bool ``[B, N]``, True for tokens that are no padding.
            context_mask: the same, and counts before ``mask``.
            attn_mask: bool ``[N, N]``, True for what is seen.
            return_intermediates: return ``(output, Intermediates)``.
            causal: as the layer is, or None.
            unknown: positions, which are ignored; anything else must be None.
        """
        refuse_unknown(unknown, _IGNORED, type(self).__name__, "x_transformers")
        config = self.mixer.config
        if causal is not None and causal != config.causal:
            raise ValueError(f"causal={causal}, and this hyper layer was made with causal={config.causal}")
        valid = mask if context_mask is None else context_mask
        if attn_mask is not None:
            length = x.shape[1]
            if attn_mask.shape != (length, length):
                raise ValueError(f"attn_mask must be [{length}, {length}], got {tuple(attn_mask.shape)}")
            seen = visible(attn_mask, "attn_mask")
            shown = padding((seen.tril() if config.causal else seen)[None], x, config)
            valid = shown if valid is None else valid & shown
        out: Tensor = self.sublayer_dropout(self.mixer(x, trimmed(valid)))
        if not return_intermediates:
            return out
        return out, import_module("x_transformers.attend").Intermediates()


class XTransformersAdapter(SizedAdapter):
    """``attn_layers.layers.{j}.1``, of decoders and encoders."""

    wrapper = XTransformersAttention

    @staticmethod
    def tokens(around: Any) -> int | None:
        return getattr(around, "max_seq_len", None) or None

    def at(self, model: nn.Module, name: str) -> Adapter:
        reason = _reason(model, name)
        return Stays(reason) if reason else super().at(model, name)

    def describe(self, module: Any) -> Host:
        if module.qkv_receive_diff_residuals:
            raise ValueError("its queries, keys and values read three different sequences, and a hyper layer one")
        if module.to_q.in_features != (width := module.to_v.in_features):
            raise ValueError(f"its queries read {module.to_q.in_features} channels and its values {width}")
        past = module.max_attend_past
        return Host(
            hidden_size=width,
            num_heads=module.heads,
            causal=module.causal,
            max_length=self.length,
            window=None if past is None else past + 1,
            output_dropout=0.0 if module.sublayer_dropout is None else module.sublayer_dropout.p,
            not_offered="its attention has many options that change its scores and values",
        )

    def finish(self, model: nn.Module, swaps: Sequence[Mapping[str, Any]]) -> None:
        """Models remember whether they can generate with a cache of keys and values, which hyper layers do not fill."""
        for holder in model.modules():
            if "can_cache_kv" in vars(holder):
                swapped = any(isinstance(module, XTransformersAttention) for module in holder.modules())
                hold_off(holder, "can_cache_kv", swapped)


def _reason(model: nn.Module, name: str) -> str | None:
    """Why the module called ``name`` stays, by what the layers around it say."""
    parts = name.split(".")
    for depth in reversed(range(len(parts))):
        layers: Any = model.get_submodule(".".join(parts[:depth]))
        if hasattr(layers, "layer_types"):
            break
    else:
        return "it stands outside of x-transformers' AttentionLayers"
    if layers.layer_types[int(parts[depth + 1])] == "c":
        return CROSS
    if layers.add_value_residual or layers.residual_attn:
        return "its layers hand values or scores on to one another, which a hyper layer has not"
    return None


ADAPTER = XTransformersAdapter()
