"""BERT and its kin: the self-attention without its output projection, which a module beside it holds."""

from __future__ import annotations

from typing import Any

from torch import nn

from hypermlp.integrations.host import Host
from hypermlp.integrations.huggingface.adapter import HuggingFaceAdapter, separate
from hypermlp.integrations.registry import Adapter
from hypermlp.integrations.sites import CROSS_ATTENTION

# models that count positions from the one after the padding token's
_AFTER_PADDING = ("camembert", "roberta", "xlm-roberta")


class BertAdapter(HuggingFaceAdapter):
    """``bert.encoder.layer.{i}.attention.self``, in an encoder or a decoder."""

    arguments = frozenset({"encoder_hidden_states", "encoder_attention_mask"})

    def at(self, model: nn.Module, name: str) -> Adapter:
        # ESM has one class for both
        return CROSS_ATTENTION if name.endswith("crossattention.self") else self

    def describe(self, module: Any) -> Host:
        config, heads = module.config, module.num_attention_heads
        rotary = getattr(config, "position_embedding_type", None) == "rotary"
        before = config.pad_token_id + 1 if config.model_type in _AFTER_PADDING else 0
        return Host(
            hidden_size=config.hidden_size,
            num_heads=heads,
            causal=config.is_decoder and getattr(config, "is_causal", True),
            layer_idx=module.layer_idx,
            max_length=config.max_position_embeddings - before,
            output_projection=False,
            rope_theta=getattr(config, "rope_theta", 10000.0) if rotary else None,
            projections=lambda: separate(module, ("query", "key", "value"), heads, module.attention_head_size**-0.5),
        )


ADAPTER = BertAdapter()
