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
        layers, groups, inner = config.num_hidden_layers, config.num_hidden_groups, config.inner_group_num
        held, calls = groups * inner, layers * inner
        called = inner * len({int(layer / (layers / groups)) for layer in range(layers)})  # as its encoder counts
        said = f"the model has {held} of it and calls "
        notes = [f"{said}them {calls} times, and so the hyper layers in their place"] if calls > held else []
        if called < held:
            notes.append(f"{said}{called} of these; so it is with the hyper layers, and the others get no gradient")
        return Host(
            hidden_size=config.hidden_size,
            num_heads=heads,
            causal=False,
            max_length=config.max_position_embeddings,
            output_dropout=module.output_dropout.p,
            projections=lambda: separate(module, ("query", "key", "value", "dense"), heads, module.scaling),
            notes=tuple(notes),
        )

    def wrap(self, layer: AttentionLayer, module: Any, host: Host) -> nn.Module:
        made = super().wrap(layer, module, host)
        made.LayerNorm = module.LayerNorm
        return made


ADAPTER = AlbertAdapter()
