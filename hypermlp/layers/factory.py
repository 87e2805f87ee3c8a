"""A layer from its description."""

from __future__ import annotations

import dataclasses

import torch

from hypermlp.checks import check_kind
from hypermlp.config import HyperConfig
from hypermlp.layers.base import AttentionLayer
from hypermlp.layers.baselines import ReLUAttention, SoftmaxAttention
from hypermlp.layers.hyper import HyperGLU, HyperMLP
from hypermlp.ops.attention import Backend

_CLASSES: dict[str, type[AttentionLayer]] = {
    cls.mixer: cls for cls in (HyperGLU, HyperMLP, ReLUAttention, SoftmaxAttention)
}


def build_layer(
    config: HyperConfig,
    *,
    backend: Backend = "auto",
    layer_idx: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> AttentionLayer:
    """The layer that ``config`` describes, newly initialised."""
    check_kind("config", config, HyperConfig, "HyperConfig(hidden_size, num_heads, mixer=...)")
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    cls = _CLASSES[fields.pop("mixer")]
    return cls(**fields, backend=backend, layer_idx=layer_idx, device=device, dtype=dtype)
