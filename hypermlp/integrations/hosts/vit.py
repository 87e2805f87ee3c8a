"""ViT of transformers and the vision models built like it: separate projections, no cache, no causality."""

from __future__ import annotations

from typing import Any

from torch import nn

from hypermlp.integrations.host import Host, Projection, Projections
from hypermlp.integrations.huggingface.adapter import HuggingFaceAdapter
from hypermlp.integrations.positions import fit_grid
from hypermlp.integrations.registry import register
from hypermlp.layers import AttentionLayer


class ViTAdapter(HuggingFaceAdapter):
    """``vit.layers.{i}.attention``. Class, distillation and register tokens are positions like all others.

    Args:
        prefix_tokens: tokens before the patches, registers not counted.
    """

    def __init__(self, prefix_tokens: int = 1) -> None:
        self.prefix_tokens = prefix_tokens

    def describe(self, module: Any) -> Host:
        if not hasattr(module, "q_proj"):
            raise ValueError(
                "this version of transformers builds its vision attention otherwise: "
                "upgrade transformers to 5.18 or later"
            )
        config = module.config
        (height, width), (down, right) = _pair(config.image_size), _pair(config.patch_size)
        registers = getattr(config, "num_register_tokens", 0)
        return Host(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            causal=False,
            max_length=self.prefix_tokens + registers + (height // down) * (width // right),
            projections=lambda: _projections(module),
        )

    def wrap(self, layer: AttentionLayer, module: Any, host: Host) -> nn.Module:
        fit_grid(layer)
        return super().wrap(layer, module, host)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _projections(module: nn.Module) -> Projections:
    attention: Any = module
    query, key, value = (
        Projection.of(linear.weight, linear.bias, attention.num_attention_heads)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return Projections(query, key, value, (attention.o_proj.weight, attention.o_proj.bias), attention.scaling)


register(ViTAdapter(), "ViTAttention", "ViTMSNAttention", "Dinov2Attention", "Dinov2WithRegistersAttention")
register(ViTAdapter(prefix_tokens=2), "DeiTAttention")
