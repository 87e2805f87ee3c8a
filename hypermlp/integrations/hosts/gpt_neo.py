"""GPT-Neo: separate projections, unscaled scores, and a window in every other layer."""

from __future__ import annotations

from typing import Any

from hypermlp.integrations.host import Host
from hypermlp.integrations.huggingface.adapter import HuggingFaceAdapter, separate


class GPTNeoAdapter(HuggingFaceAdapter):
    """``transformer.h.{i}.attn.attention``."""

    def describe(self, module: Any) -> Host:
        config = module.config
        local = config.attention_layers[module.layer_id] == "local"
        return Host(
            hidden_size=module.embed_dim,
            num_heads=module.num_heads,
            layer_idx=module.layer_id,
            max_length=config.max_position_embeddings,
            window=config.window_size if local else None,
            output_dropout=module.resid_dropout.p,
            projections=lambda: separate(module, ("q_proj", "k_proj", "v_proj", "out_proj"), module.num_heads, 1.0),
        )


ADAPTER = GPTNeoAdapter()
