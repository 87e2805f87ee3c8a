"""Whole attention layers: what is compared, each with the way to compute it exactly."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from hypermlp.budget import match_parameters
from hypermlp.config import HyperConfig
from hypermlp.layers import AttentionLayer, HyperGLU, HyperMLP, SoftmaxAttention, build_layer
from hypermlp_lab.bench.gate import Errors, compare, with_gradients
from hypermlp_lab.bench.measure import extra_peak_bytes, wall_seconds
from hypermlp_lab.bench.run import Benchmark, Prepared, throughput
from hypermlp_lab.bench.settings import Case, Provider

# T x T maps for every score map that the dense path has alive at once in forward+backward:
# 7.7 to 8.9 measured at T = 512 to 4096, rounded up
REFERENCE_MAPS = 9

# narrow layers have few widths to choose from; at the default width the match is within 0.2 %
_MATCH = 0.03


@dataclass(frozen=True, kw_only=True)
class LayerCase(Case):
    """One size to measure. Layers are built with ``max_lag = length``."""

    hidden_size: int = 256
    num_heads: int = 2


@dataclass(frozen=True, kw_only=True)
class LayerProvider(Provider):
    """A layer to measure.

    Attributes:
        build: the layer for a case, newly initialised.
        exact: ``(layer, hidden_states)`` to the output that a float64 copy of the layer must
            give, computed another way; the gate compares with it.
    """

    build: Callable[[Any], AttentionLayer]
    exact: Callable[[AttentionLayer, Tensor], Tensor]


class Contestant:
    """A layer with its input, ready to be called again and again without leaving anything behind."""

    def __init__(self, layer: AttentionLayer, hidden_states: Tensor) -> None:
        self.layer, self.hidden_states = layer, hidden_states.detach().requires_grad_()
        self.pull = torch.randn_like(hidden_states)

    def clear(self) -> None:
        """Drop gradients, so that a call neither adds to old ones nor finds memory for new ones."""
        self.hidden_states.grad = None
        self.layer.zero_grad(set_to_none=True)

    def call(self, mode: str) -> None:
        """One call; the output is not kept. Forward alone is inference, without autograd."""
        if mode == "forward":
            with torch.no_grad():
                self.layer(self.hidden_states)
        else:
            self.layer(self.hidden_states).backward(self.pull)

    def seconds(self, mode: str) -> float:
        """Of one call."""
        self.clear()
        seconds = wall_seconds(partial(self.call, mode), self.hidden_states.device)
        self.clear()
        return seconds


class LayerBenchmark(Benchmark[LayerProvider, LayerCase]):
    """Forward and forward+backward of layers."""

    name = "attention"

    def errors(self, provider: LayerProvider, case: LayerCase) -> Errors:
        """Of the output and of every gradient, by the parameter's name."""
        layer, draw = randomised(provider, case)
        x, pull = (draw(case.batch, case.length, case.hidden_size) for _ in range(2))

        def evaluate(exact_in: torch.dtype | None) -> dict[str, Tensor]:
            if exact_in is None:
                return with_gradients(layer, layer, x, pull)
            module = deepcopy(layer).to(exact_in)
            return with_gradients(partial(provider.exact, module), module, x.to(exact_in), pull)

        return compare(evaluate, case.dtype)

    def prepare(self, provider: LayerProvider, case: LayerCase, mode: str) -> Prepared:
        states = torch.randn(case.batch, case.length, case.hidden_size, **case.factory)
        contestant = Contestant(provider.build(case), states)
        # this call warms up too
        peak = extra_peak_bytes(partial(contestant.call, mode), self.device)
        contestant.clear()
        return Prepared(partial(contestant.seconds, mode), throughput(contestant.layer, case, peak))


@torch.no_grad()
def randomised(provider: LayerProvider, case: LayerCase) -> tuple[AttentionLayer, Callable[..., Tensor]]:
    """A layer away from its start, where some tables are zero and could be ignored unnoticed; what draws its inputs."""
    layer = provider.build(case)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(**case.factory)

    for parameter in layer.parameters():
        parameter.add_(0.05 * draw(*parameter.shape))
    return layer, draw


def hyperglu(backend: str) -> Callable[[LayerCase], AttentionLayer]:
    def build(case: LayerCase) -> AttentionLayer:
        path, sizes = cast(Any, backend), (case.hidden_size, case.num_heads)
        return HyperGLU(*sizes, max_lag=case.length, backend=path, layer_idx=0, **case.factory)

    return build


def softmax(case: LayerCase) -> AttentionLayer:
    return SoftmaxAttention(case.hidden_size, case.num_heads, layer_idx=0, **case.factory)


def _softmax_pc(case: LayerCase) -> AttentionLayer:
    return SoftmaxAttention(case.hidden_size, case.num_heads, rope=True, conv_size=4, **case.factory)


def softmax_wide(case: LayerCase) -> AttentionLayer:
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
    q, k, v, gates = layer.streams(hidden_states)
    return layer.output(dense_softmax(q, k, v).flatten(-2), gates)


def dense_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of streams ``[B, T, heads, width]``."""
    scores = torch.einsum("bihk,bjhk->bhij", q, k) * q.shape[-1] ** -0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return torch.einsum("bhij,bjhv->bihv", scores.masked_fill(future, float("-inf")).softmax(-1), v)


def reference_bytes(case: LayerCase) -> int:
    num_maps = 2
    itemsize = torch.promote_types(case.dtype, torch.float32).itemsize
    return REFERENCE_MAPS * case.batch * num_maps * case.num_heads * case.length**2 * itemsize


_ours = partial(LayerProvider, exact=by_reference)
_baseline = partial(LayerProvider, exact=by_dense_softmax, baseline=True)
ATTENTION_PROVIDERS = (
    _ours("hyperglu-auto", "HyperGLU, as it comes: the native path where there is a compiler", build=hyperglu("auto")),
    _ours("hyperglu-chunked", "HyperGLU, chunked path", build=hyperglu("chunked")),
    _ours("hyperglu-reference", "HyperGLU, dense reference", build=hyperglu("reference"), peak_bytes=reference_bytes),
    _baseline("softmax", "softmax (SDPA), same hidden size", build=softmax),
    _baseline("softmax-pc", "softmax with RoPE and convolutions (S-pc)", build=_softmax_pc),
    _baseline("softmax-wide", "softmax widened to HyperGLU's parameters", build=softmax_wide),
)
# what a GPU is for: the fused kernels, and no dense maps
LAYER_PROVIDERS_ON_GPU = (
    _ours("hyperglu-triton", "HyperGLU, fused kernels", build=hyperglu("triton")),
    *(provider for provider in ATTENTION_PROVIDERS[1:] if provider.peak_bytes is None),
)
