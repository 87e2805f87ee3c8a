"""CLIP and SigLIP: one class for pictures and for text, which its config tells apart."""

from __future__ import annotations

from typing import Any

from hypermlp.integrations.host import Host
from hypermlp.integrations.hosts.vit import patches
from hypermlp.integrations.huggingface.adapter import HuggingFaceAdapter, separate
from hypermlp.integrations.positions import fit_grid
from hypermlp.layers import AttentionLayer

# the model of text that hides later tokens, and that of pictures with a class token
_CAUSAL, _CLASS_TOKEN = "clip_text_model", "clip_vision_model"


class ClipAdapter(HuggingFaceAdapter):
    """``encoder.layers.{i}.self_attn``."""

    def describe(self, module: Any) -> Host:
        config = module.config
        picture, causal = hasattr(config, "image_size"), config.model_type == _CAUSAL
        said = getattr(config, "is_causal", causal)
        if said != causal:
            raise ValueError(
                f"its config says is_causal={said!r}, which this model obeys with some attn_implementation and not "
                "with others: leave it out of the config"
            )
        return Host(
            hidden_size=module.embed_dim,
            num_heads=module.num_heads,
            causal=causal,
            max_length=patches(config) + (config.model_type == _CLASS_TOKEN)
            if picture
            else config.max_position_embeddings,
            projections=lambda: separate(
                module, ("q_proj", "k_proj", "v_proj", "out_proj"), module.num_heads, module.scale
            ),
        )

    def wrap(self, layer: AttentionLayer, module: Any, host: Host) -> Any:
        if hasattr(module.config, "image_size"):
            fit_grid(layer)
        return super().wrap(layer, module, host)


ADAPTER = ClipAdapter()
