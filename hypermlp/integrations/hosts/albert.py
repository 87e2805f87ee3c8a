"""ALBERT: one attention for many layers, which adds its input to its output and normalises the sum itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hypermlp.integrations.host import Host
from hypermlp.integrations.huggingface.adapter import HuggingFaceAdapter, separate
from hypermlp.integrations.huggingface.attention import HuggingFaceAttention
from hypermlp.layers import AttentionLayer


class AlbertAttention(HuggingFaceAttention):
    """The hyper layer, and around it the host's residual and its own norm, under the name that checkpoints have."""

    LayerNorm: nn.Module

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **others: Any
    ) -> tuple[Tensor, Tensor | None]:
        out, weights = super().forward(hidden_states, attention_mask, **others)
        return self.LayerNorm(hidden_states + out), weights


class AlbertAdapter(HuggingFaceAdapter):
    """``albert.encoder.albert_layer_groups.{i}.albert_layers.{j}.attention``."""

    wrapper = AlbertAttention

    def describe(self, module: Any) -> Host:
        config, heads = module.config, module.num_attention_heads
        calls, held = (count * config.inner_group_num for count in (config.num_hidden_layers, config.num_hidden_groups))
        shared = f"the model has {held} of it and calls them {calls} times, and so the hyper layers in their place"
        return Host(
            hidden_size=config.hidden_size,
            num_heads=heads,
            causal=False,
            max_length=config.max_position_embeddings,
            output_dropout=module.output_dropout.p,
            projections=lambda: separate(module, ("query", "key", "value", "dense"), heads, heads, module.scaling),
            notes=(shared,) if calls > held else (),
        )

    def wrap(self, layer: AttentionLayer, module: Any, host: Host) -> nn.Module:
        made = super().wrap(layer, module, host)
        made.LayerNorm = module.LayerNorm
        return made


ADAPTER = AlbertAdapter()
