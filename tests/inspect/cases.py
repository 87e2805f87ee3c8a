"""Layers over texts, and their maps from the definition: the oracle reads unit vectors in the place of values."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hypermlp import HyperConfig, MixConfig, SequenceMix, build_layer
from hypermlp.inspect import HeadMaps, LayerCall
from hypermlp.layers import AttentionLayer
from hypermlp.layers.operator_layer import OperatorLayer
from tests.helpers import Case
from tests.oracle import _keys_and_table_rows, oracle

LENGTH, HIDDEN = 9, 12
# every kind of layer and of layout, and mixings with parts left out
LAYERS: dict[str, dict[str, Any]] = {
    "glu, window": {"mixer": "hyperglu", "max_lag": 6, "mix_rank": 2},
    "glu, biases": {"mixer": "hyperglu", "max_lag": 20, "mix_rank": 2, "bias": True, "rope": True, "qk_dim": 8},
    "mlp, by position": {"mixer": "hypermlp", "max_lag": 9, "mix_rank": 3, "layout": "position"},
    "glu, both ways": {"mixer": "hyperglu", "max_lag": 9, "mix_rank": 2, "causal": False},
    "mlp, no norm, parts": {
        "mixer": "hypermlp", "max_lag": 9, "norm": False,
        "routing_mix": MixConfig(2, diag=False, identity=False), "readout_mix": MixConfig(0),
    },
    "mlp, one mixing": {"mixer": "hypermlp", "max_lag": 9, "routing_mix": False, "mix_rank": 2},
    "relu": {"mixer": "relu", "max_lag": 5},
}  # fmt: skip
SOFTMAX: dict[str, dict[str, Any]] = {
    "softmax": {"mixer": "softmax"},
    "softmax, window": {"mixer": "softmax", "max_lag": 4, "bias": True},
    "softmax, both ways": {"mixer": "softmax", "causal": False, "max_lag": 4},
}
_HOLES = torch.ones(2, LENGTH, dtype=torch.bool)
_HOLES[1, :3] = _HOLES[0, -2:] = _HOLES[1, 5] = False
TOKENS: dict[str, dict[str, Tensor]] = {
    "all": {},
    "padded": {"attention_mask": _HOLES},
    "packed": {"cu_seqlens": torch.tensor([1, 4, 8])},
}


def make(mixer: str, dtype: torch.dtype = torch.float64, **options: Any) -> AttentionLayer:
    """A layer away from its start, of which every part shows."""
    torch.manual_seed(0)
    layer = build_layer(HyperConfig(HIDDEN, mixer=mixer, **({"conv_size": 3} | options)), layer_idx=0, dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.4)
    return layer


def call(layer: AttentionLayer, tokens: str = "all") -> LayerCall:
    batch = 1 if tokens == "packed" else 2
    x = torch.randn(batch, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    given = TOKENS[tokens]
    return LayerCall("", layer, x, given.get("attention_mask"), given.get("cu_seqlens"))


def case_of(made: LayerCall, **options: Any) -> Case:
    """The operator's inputs of a call, with unit vectors for values; ``options`` win over the layer's."""
    layer, x, mask, bounds = made[1:]
    tokens = layer.tokens(x, mask, bounds)
    q, k, v, gates = layer.streams(tokens.zeroed(x), tokens)
    unit = torch.eye(x.shape[1], dtype=x.dtype).expand(x.shape[0], v.shape[2], -1, -1).transpose(1, 2)
    tensors, c = {"q": q, "k": k, "v": unit}, layer.config
    switches = {"selection": "glu" if c.num_maps == 2 else "relu", "norm": c.norm, "eps": c.eps, "causal": c.causal}
    switches |= {"layout": c.layout, "max_lag": c.max_lag}
    mixes = layer.mixes(q, gates) if isinstance(layer, OperatorLayer) else (SequenceMix(), SequenceMix())
    for name, mix in zip(("routing", "readout"), mixes, strict=True):
        parts = {"diag": mix.diag, "down": mix.down, "up": mix.up, "core": mix.core}
        tensors |= {f"{name}.{part}": y for part, y in parts.items() if y is not None}
        switches[f"{name}_identity"] = mix.identity
    return Case(tensors, switches | options)


def by_key(made: LayerCall, case: Case) -> Tensor:
    """What the oracle reads of each key, ``[B, H, T, T]``."""
    return oracle(case, made.attention_mask, made.cu_seqlens).transpose(1, 2)


def columns(made: LayerCall, case: Case) -> list[tuple[int, int, int, int]]:
    """Every visible cell by the oracle: row of the batch, query, key and column."""
    batch, length = made.hidden_states.shape[:2]
    valid = torch.ones(batch, length, dtype=torch.bool) if made.attention_mask is None else made.attention_mask
    bounds = [0, length] if made.cu_seqlens is None else made.cu_seqlens.tolist()
    return [
        (b, i, key, row)
        for b in range(batch)
        for lo, hi in pairwise(bounds)
        for i in range(lo, hi)
        if valid[b, i]
        for key, row in zip(*_keys_and_table_rows(case, valid, b, i, lo, hi), strict=True)
    ]


def spread(maps: HeadMaps, cells: list[tuple[int, int, int, int]], of: Tensor) -> Tensor:
    """``of`` by column, ``[B, H, T, n]``, as ``[B, H, T, T]`` by key."""
    found = of.new_zeros(*of.shape[:3], of.shape[2])
    for b, i, key, column in cells:
        found[b, :, i, key] = of[b, :, i, column]
    return found
