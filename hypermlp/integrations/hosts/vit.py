"""ViT of transformers and the vision models built like it: separate projections, no cache, no causality."""

from __future__ import annotations

from typing import Any

from torch import nn

from hypermlp.integrations.host import Host
from hypermlp.integrations.huggingface.adapter import HuggingFaceAdapter, separate
from hypermlp.integrations.positions import fit_grid
from hypermlp.layers import AttentionLayer


class ViTAdapter(HuggingFaceAdapter):
    """``vit.layers.{i}.attention``. Class, distillation and register tokens are positions like all others."""

    def describe(self, module: Any) -> Host:
        if not hasattr(module, "q_proj"):
            raise ValueError(
                "this version of transformers builds its vision attention otherwise: "
                "upgrade transformers to 5.18 or later"
            )
        config, heads = module.config, module.config.num_attention_heads
        prefix = (2 if config.model_type == "deit" else 1) + getattr(config, "num_register_tokens", 0)
        return Host(
            hidden_size=config.hidden_size,
            num_heads=heads,
            causal=False,
            max_length=prefix + patches(config),
            projections=lambda: separate(module, ("q_proj", "k_proj", "v_proj", "o_proj"), heads, module.scaling),
        )

    def wrap(self, layer: AttentionLayer, module: Any, host: Host) -> nn.Module:
        fit_grid(layer)
        return super().wrap(layer, module, host)


def patches(config: Any) -> int:
    """Patches of a picture of the size that a model was made for."""
    (height, width), (down, right) = _pair(config.image_size), _pair(config.patch_size)
    return int((height // down) * (width // right))


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


ADAPTER = ViTAdapter()
