"""What is compared: a registry of layers, each with the way to compute it exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from hypermlp.budget import match_parameters
from hypermlp.config import HyperConfig
from hypermlp.layers import AttentionLayer, HyperGLU, HyperMLP, SoftmaxAttention, build_layer

# T x T maps for every score map that the dense path has alive at once in forward+backward:
# 7.7 to 8.9 measured at T = 512 to 4096, rounded up
REFERENCE_MAPS = 9

# narrow layers have few widths to choose from; at the default width the match is within 0.2 %
_MATCH = 0.03


@dataclass(frozen=True)
class Case:
    """One size to measure. Layers are built with ``max_lag = length``."""

    length: int
    hidden_size: int = 256
    num_heads: int = 2
    batch: int = 1
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    @property
    def factory(self) -> dict[str, Any]:
        return {"device": self.device, "dtype": self.dtype}


@dataclass(frozen=True)
class Provider:
    """A layer to measure.

    Attributes:
        name: what tables and results call it.
        description: one line for a reader.
        build: the layer for a case, newly initialised.
        exact: ``(layer, hidden_states)`` to the output that a float64 copy of the layer must
            give, computed another way; the gate compares with it.
        peak_bytes: a guess at the extra memory of forward+backward, for providers that may not
            fit; None where that is no concern.
        baseline: whether the others are compared with it.
    """

    name: str
    description: str
    build: Callable[[Case], AttentionLayer]
    exact: Callable[[AttentionLayer, Tensor], Tensor]
    peak_bytes: Callable[[Case], int] | None = None
    baseline: bool = False


def count_parameters(layer: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in layer.parameters())


def hyperglu(backend: str) -> Callable[[Case], AttentionLayer]:
    def build(case: Case) -> AttentionLayer:
        return HyperGLU(
            case.hidden_size,
            case.num_heads,
            max_lag=case.length,
            backend=cast(Any, backend),
            layer_idx=0,
            **case.factory,
        )

    return build


def softmax(case: Case) -> AttentionLayer:
    return SoftmaxAttention(case.hidden_size, case.num_heads, layer_idx=0, **case.factory)


def _softmax_pc(case: Case) -> AttentionLayer:
    return SoftmaxAttention(case.hidden_size, case.num_heads, rope=True, conv_size=4, **case.factory)


def softmax_wide(case: Case) -> AttentionLayer:
    ours = HyperConfig(case.hidden_size, case.num_heads, max_lag=case.length)
    plain = HyperConfig(case.hidden_size, case.num_heads, mixer="softmax")
    return build_layer(match_parameters(ours, plain, how="widen", tolerance=_MATCH).config, layer_idx=0, **case.factory)


def by_reference(layer: AttentionLayer, hidden_states: Tensor) -> Tensor:
    assert isinstance(layer, HyperMLP)
    layer.backend = "reference"
    out: Tensor = layer(hidden_states)
    return out


def by_dense_softmax(layer: AttentionLayer, hidden_states: Tensor) -> Tensor:
    """Causal softmax attention from its formula, without PyTorch's fused operator."""
    gates = layer.gates(hidden_states)
    q = layer.queries(hidden_states, gates)
    k, v = layer.keys_values(hidden_states, None)
    scores = torch.einsum("bihk,bjhk->bhij", q, k) * q.shape[-1] ** -0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    weights = scores.masked_fill(future, float("-inf")).softmax(-1)
    return layer.output(torch.einsum("bhij,bjhv->bihv", weights, v).flatten(-2), gates)


def _reference_bytes(case: Case) -> int:
    num_maps = 2
    itemsize = torch.promote_types(case.dtype, torch.float32).itemsize
    return REFERENCE_MAPS * case.batch * num_maps * case.num_heads * case.length**2 * itemsize


ATTENTION_PROVIDERS = (
    Provider("hyperglu-chunked", "HyperGLU, chunked path", hyperglu("chunked"), by_reference),
    Provider("hyperglu-reference", "HyperGLU, dense reference", hyperglu("reference"), by_reference, _reference_bytes),
    Provider("softmax", "softmax (SDPA), same hidden size", softmax, by_dense_softmax, baseline=True),
    Provider("softmax-pc", "softmax with RoPE and convolutions (S-pc)", _softmax_pc, by_dense_softmax, baseline=True),
    Provider("softmax-wide", "softmax widened to HyperGLU's parameters", softmax_wide, by_dense_softmax, baseline=True),
)
# what a GPU is for: the fused kernels, and no dense maps
LAYER_PROVIDERS_ON_GPU = (
    Provider("hyperglu-triton", "HyperGLU, fused kernels", hyperglu("triton"), by_reference),
    *(provider for provider in ATTENTION_PROVIDERS if provider.peak_bytes is None),
)
