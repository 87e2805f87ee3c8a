"""A layer from its description."""

from __future__ import annotations

import torch

from hypermlp.config import HyperConfig
from hypermlp.layers.base import AttentionLayer
from hypermlp.layers.baselines import ReLUAttention, SoftmaxAttention
from hypermlp.layers.hyper import HyperGLU, HyperMLP
from hypermlp.ops.attention import Backend

_HYPER_ONLY = {"layout", "routing_mix", "readout_mix"}


def build_layer(
    config: HyperConfig,
    *,
    backend: Backend = "auto",
    layer_idx: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> AttentionLayer:
    """The layer that ``config`` describes, newly initialised."""
    classes: dict[str, type[HyperMLP | SoftmaxAttention]] = {
        "hyperglu": HyperGLU,
        "hypermlp": HyperMLP,
        "relu": ReLUAttention,
        "softmax": SoftmaxAttention,
    }
    cls = classes[config.mixer]
    options = config.to_dict()
    del options["mixer"]
    if cls.mixer in ("relu", "softmax"):
        options = {name: value for name, value in options.items() if name not in _HYPER_ONLY}
    layer: AttentionLayer = cls(**options, backend=backend, layer_idx=layer_idx, device=device, dtype=dtype)
    return layer
