"""MONAI: the self-attention of its vision transformers, diffusion models and decoders."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hypermlp.integrations.arguments import refuse_unknown
from hypermlp.integrations.fx import one_node
from hypermlp.integrations.host import RELATIVE, Host, Projection, Projections, nearest
from hypermlp.integrations.masks import trimmed
from hypermlp.integrations.positions import fit_grid
from hypermlp.integrations.registry import Adapter, SizedAdapter, Stays
from hypermlp.layers import AttentionLayer

_SHUFFLED = (
    "a masked autoencoder shows it a random part of the patches in random order, so that a token's place in the "
    "sequence, by which a hyper layer's tables are ordered, says nothing"
)


class MonaiSelfAttention(nn.Module):
    """A hyper layer called as MONAI's ``SABlock`` is.

    Args:
        mixer: the layer that computes.
        dropout: probability of dropout after the output projection.
        masked: whether the host reads a mask as one of padding.
    """

    def __init__(self, mixer: AttentionLayer, dropout: float = 0.0, masked: bool = True) -> None:
        super().__init__()
        self.mixer, self.dropout, self.masked = mixer, nn.Dropout(dropout), masked
        fit_grid(mixer)

    @one_node
    def forward(self, x: Tensor, attn_mask: Tensor | None = None, **unknown: Any) -> Tensor:
        """``[B, N, channels]`` to the same.

        Args:
            x: the sequence.
            attn_mask: ``[B, N]``, 0 for padding.
            unknown: must be None.
        """
        refuse_unknown(unknown, {}, type(self).__name__, "monai")
        valid = None if attn_mask is None else self._valid(x, attn_mask)
        out: Tensor = self.dropout(self.mixer(x, valid))
        return out

    def _valid(self, x: Tensor, mask: Tensor) -> Tensor | None:
        if not self.masked:
            raise ValueError(
                "attn_mask: MONAI's causal attention takes none, and its flash attention takes one of scores, which a "
                "hyper layer has not: leave it out"
            )
        if mask.shape != x.shape[:2]:
            raise ValueError(f"attn_mask must be {list(x.shape[:2])}, 0 for padding, got {list(mask.shape)}")
        return trimmed(mask != 0)


class MonaiAdapter(SizedAdapter):
    """``blocks.{i}.attn`` of ``ViT`` and ``DecoderOnlyTransformer``, and every other ``SABlock``."""

    @staticmethod
    def tokens(around: Any) -> int | None:
        """Patches and the class token of a vision transformer."""
        positions = getattr(getattr(around, "patch_embedding", None), "position_embeddings", None)
        return positions.shape[1] + hasattr(around, "cls_token") if isinstance(positions, Tensor) else None

    def at(self, model: nn.Module, name: str) -> Adapter:
        module = model.get_submodule(name)

        def shuffles(host: Any) -> bool | None:
            return any(part is module for part in host.blocks.modules()) if hasattr(host, "mask_tokens") else None

        return Stays(_SHUFFLED) if nearest(model, name, shuffles) else super().at(model, name)

    def describe(self, module: Any) -> Host:
        width = module.hidden_input_size
        if not module.include_fc and module.inner_dim != width:
            raise ValueError(f"it changes the width, {width} to {module.inner_dim}, which a hyper layer does not")
        relative = module.rel_positional_embedding is not None
        notes = ("it keeps its last map (save_attn, att_mat), which a hyper layer does not",) * module.save_attn
        return Host(
            hidden_size=width,
            num_heads=module.num_heads,
            causal=module.causal,
            max_length=module.sequence_length if module.causal else self.length,
            output_projection=module.include_fc,
            output_dropout=module.drop_output.p,
            projections=None if relative else lambda: _projections(module),
            not_offered=RELATIVE,
            notes=notes,
        )

    def wrap(self, layer: AttentionLayer, module: Any, host: Host) -> nn.Module:
        return MonaiSelfAttention(layer, host.output_dropout, not (module.causal or module.use_flash_attention))


def _projections(module: Any) -> Projections:
    heads, output = module.num_heads, module.out_proj if module.include_fc else None
    if module.use_combined_linear:
        return Projections.of_joint(module.qkv.weight, module.qkv.bias, output, heads, module.scale)
    linears = (module.to_q, module.to_k, module.to_v)
    query, key, value = (Projection.of(linear.weight, linear.bias, heads) for linear in linears)
    return Projections(query, key, value, output and (output.weight, output.bias), module.scale)


ADAPTER = MonaiAdapter()
