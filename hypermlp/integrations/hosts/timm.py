"""timm's vision transformers: by :func:`~hypermlp.swap_attention`, or built with hyper layers from the start."""

from __future__ import annotations

import copyreg
from functools import partial
from typing import Any

from torch import Tensor, nn

from hypermlp.checks import check_names
from hypermlp.config import HyperConfig, HyperFields, Mixer
from hypermlp.integrations.arguments import refuse_unknown
from hypermlp.integrations.fx import one_node
from hypermlp.integrations.host import Host, Projections
from hypermlp.integrations.masks import padding, trimmed, visible
from hypermlp.integrations.positions import fit_grid
from hypermlp.integrations.registry import SizedAdapter
from hypermlp.layers import AttentionLayer, build_layer
from hypermlp.ops.attention import check_backend

_FROM_MODEL = {"hidden_size", "causal", "layer_idx", "device", "dtype"}
_OPTIONS = (*HyperFields.__annotations__, "num_heads", "backend", *_FROM_MODEL)
# what timm says of attention to build it, and why it may be ignored here
_SOFTMAX = {
    "num_heads": "the mixer has heads of its own",
    "attn_head_dim": "the mixer has widths of its own",
    "qkv_bias": "bias is an option of timm_attention",
    "proj_bias": "bias is an option of timm_attention",
    "qk_norm": "scores are not normalised by softmax",
    "scale_norm": "the mixer's rows of weights are normalised",
    "norm_layer": "of those two",
    "gated": "the output gate is an option of timm_attention",
    "attn_drop": "dropout on attention weights has no counterpart",
}


class TimmAttention(nn.Module):
    """A hyper layer called as timm's ``Attention`` is: ``[B, N, C]`` to the same, a bare tensor.

    Args:
        mixer: the layer that computes.
        proj_drop: probability of dropout after the output projection.
    """

    def __init__(self, mixer: AttentionLayer, proj_drop: float = 0.0) -> None:
        super().__init__()
        self.mixer = mixer
        self.proj_drop = nn.Dropout(proj_drop)
        fit_grid(mixer)

    @one_node
    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **unknown: Any) -> Tensor:
        """Masks may hide padding alone: bool (True is seen) or additive, broadcast to ``[B, heads, N, N]``."""
        refuse_unknown(unknown, {}, type(self).__name__, "timm")
        if is_causal:
            raise ValueError("is_causal=True: this hyper layer is bidirectional, as timm's models are")
        out: Tensor = self.proj_drop(self.mixer(x, trimmed(self._valid(x, attn_mask))))
        return out

    def init_weights(self) -> None:
        """What timm calls after it has started every linear layer its own way: the layer's own start."""
        self.mixer.reset_parameters()

    def _valid(self, x: Tensor, attn_mask: Tensor | None) -> Tensor | None:
        if attn_mask is None:
            return None
        seen = visible(attn_mask, "attn_mask")
        if seen.ndim == 4 and seen.shape[1] == 1:
            seen = seen[:, 0]
        elif seen.ndim != 2:
            raise ValueError(f"attn_mask must be [N, N] or [B, 1, N, N], got {tuple(attn_mask.shape)}")
        batch, length = x.shape[:2]
        return padding(seen.expand(batch, length, length), x, self.mixer.config)


class _AttnLayerType(type):
    """Of the classes that :func:`timm_attention` makes. timm's models keep them, so pickle makes them again."""

    made_by: tuple[Mixer, dict[str, Any]]


def timm_attention(mixer: Mixer = "hyperglu", **options: Any) -> type:
    """A class for ``timm.create_model(..., attn_layer=...)``; what it makes is a :class:`TimmAttention`.

    Of what timm says about attention it takes the width, the dropout of the output, device and dtype;
    the rest (its heads, biases, norms of queries and keys, dropout of weights) is softmax attention's.

    Args:
        mixer: as in :func:`~hypermlp.swap_attention`.
        options: fields of :class:`~hypermlp.HyperConfig`, and ``backend``. A hyper mixer needs
            ``max_lag``, the number of tokens: patches, class token and registers.

    Example:
        >>> attn_layer = timm_attention("hyperglu", max_lag=14 * 14 + 1)
        >>> model = timm.create_model("vit_tiny_patch16_224", attn_layer=attn_layer)  # doctest: +SKIP
    """
    check_names("timm_attention", options, _OPTIONS)
    backend = options.pop("backend", "auto")
    check_backend(backend)
    if mixer in ("hyperglu", "hypermlp") and options.get("max_lag") is None:
        raise ValueError("max_lag is missing: say how many tokens there are, patches, class token and registers")
    fixed = sorted(_FROM_MODEL & options.keys())
    if fixed:
        raise ValueError(f"{fixed[0]} is taken from the model: leave it out")

    class AttnLayer(metaclass=_AttnLayerType):
        made_by = (mixer, {**options, "backend": backend})

        def __new__(  # type: ignore[misc]
            cls, dim: int, proj_drop: float = 0.0, dim_out: int | None = None,
            device: Any = None, dtype: Any = None, **softmax: Any,
        ) -> TimmAttention:  # fmt: skip
            refuse_unknown(softmax, _SOFTMAX, "timm_attention", "timm")
            if dim_out not in (None, dim):
                raise ValueError(f"dim_out={dim_out} changes the width of {dim}, which a hyper layer does not")
            config = HyperConfig(dim, mixer=mixer, causal=False, **options)
            return TimmAttention(build_layer(config, backend=backend, device=device, dtype=dtype), proj_drop)

    return AttnLayer


def _made_by(made: _AttnLayerType) -> tuple[Any, ...]:
    mixer, options = made.made_by
    return partial(timm_attention, mixer, **options), ()


copyreg.pickle(_AttnLayerType, _made_by)


class TimmAdapter(SizedAdapter):
    """``blocks.{i}.attn`` of vision transformers."""

    wrapper = TimmAttention

    @staticmethod
    def tokens(around: Any) -> int | None:
        """Patches and other tokens of a vision transformer."""
        patches = getattr(getattr(around, "patch_embed", None), "num_patches", None)
        return None if patches is None else patches + getattr(around, "num_prefix_tokens", 0)

    def describe(self, module: Any) -> Host:
        if module.proj.out_features != module.qkv.in_features:
            raise ValueError("it changes the width, which a hyper layer does not")
        added = [getattr(module, name, None) for name in ("q_norm", "k_norm", "norm", "gate")]
        plain = all(part is None or isinstance(part, nn.Identity) for part in added)
        return Host(
            hidden_size=module.qkv.in_features,
            num_heads=module.num_heads,
            causal=False,
            max_length=self.length,
            output_dropout=module.proj_drop.p,
            projections=(lambda: _projections(module)) if plain else None,
            not_offered="it normalises or gates within, which a hyper layer does otherwise",
        )


def _projections(module: Any) -> Projections:
    return Projections.of_joint(module.qkv.weight, module.qkv.bias, module.proj, module.num_heads, module.scale)


ADAPTER = TimmAdapter()
