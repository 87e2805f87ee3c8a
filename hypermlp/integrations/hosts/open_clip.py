"""open_clip: ``nn.MultiheadAttention`` in its usual blocks, an attention of its own in the others."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hypermlp.integrations.arguments import refuse_unknown
from hypermlp.integrations.fx import one_node
from hypermlp.integrations.host import Host, Projections, learned_positions, nearest
from hypermlp.integrations.masks import padding, trimmed, visible
from hypermlp.integrations.registry import Adapter
from hypermlp.layers import AttentionLayer

BLOCK = "open_clip.transformer.ResidualAttentionBlock"


class OpenClipAttention(nn.Module):
    """A hyper layer called as open_clip's ``Attention`` is: ``[B, L, D]`` to the same.

    Args:
        mixer: the layer that computes.
        dropout: probability of dropout after the output projection.
    """

    def __init__(self, mixer: AttentionLayer, dropout: float = 0.0) -> None:
        super().__init__()
        self.mixer, self.out_drop = mixer, nn.Dropout(dropout)

    @one_node
    def forward(self, x: Tensor, attn_mask: Tensor | None = None, **unknown: Any) -> Tensor:
        """``attn_mask`` ``[L, L]``, additive or True for what is hidden, may hide padding and later tokens."""
        refuse_unknown(unknown, {}, type(self).__name__, "open_clip")
        config = self.mixer.config
        if attn_mask is None and config.causal and x.shape[1] > 1:
            raise ValueError("this hyper layer is causal and was called without a causal attn_mask")
        valid = None
        if attn_mask is not None:
            seen = visible(attn_mask, "attn_mask", true_hides=True)
            if seen.shape != (x.shape[1], x.shape[1]):
                raise ValueError(f"attn_mask must be [{x.shape[1]}, {x.shape[1]}], got {tuple(attn_mask.shape)}")
            valid = padding(seen[None], x, config)
        out: Tensor = self.out_drop(self.mixer(x, trimmed(valid)))
        return out


class OpenClipAdapter(Adapter):
    """``resblocks.{i}.attn`` of blocks with an attention of open_clip's own.

    Args:
        causal: whether later tokens are hidden.
        length: tokens it sees.
    """

    def __init__(self, causal: bool = False, length: int | None = None) -> None:
        self.causal, self.length = causal, length

    def at(self, model: nn.Module, name: str) -> Adapter:
        module: Any = model.get_submodule(name)
        return OpenClipAdapter(hides_later(model, name), learned_positions(model, name, module.out_proj.in_features))

    def describe(self, module: Any) -> Host:
        width = module.out_proj.in_features
        norms = [key for key in ("ln_q", "ln_k", "ln_inner") if not isinstance(getattr(module, key), nn.Identity)]
        scales = [key for key in ("logit_scale", "head_scale") if getattr(module, key) is not None]
        other = ", ".join(norms + scales)
        return Host(
            hidden_size=width,
            num_heads=module.num_heads,
            causal=self.causal,
            max_length=self.length,
            output_dropout=module.out_drop.p,
            projections=None if other else lambda: joint_projections(module, module.scale),
            not_offered=f"it normalises or scales within ({other}), which a hyper layer does not",
        )

    def wrap(self, layer: AttentionLayer, module: nn.Module, host: Host) -> nn.Module:
        return OpenClipAttention(layer, host.output_dropout)


def hides_later(model: nn.Module, name: str) -> bool:
    """Whether the module called ``name`` reads text: the nearest holder of positions has a causal mask then."""

    def read(host: Any) -> int | None:
        if getattr(host, "positional_embedding", None) is None:
            return None
        return int(getattr(host, "attn_mask", None) is not None)

    return bool(nearest(model, name, read))


def joint_projections(module: Any, scaling: float) -> Projections:
    """Of ``nn.MultiheadAttention``, and of open_clip's attention, which has the same names."""
    return Projections.of_joint(module.in_proj_weight, module.in_proj_bias, module.out_proj, module.num_heads, scaling)


ADAPTER = OpenClipAdapter()
