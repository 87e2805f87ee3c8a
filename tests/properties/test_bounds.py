"""Bounds of packed sequences: tokens outside all of them are padding, and a sequence may be empty, in every mode."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from hypermlp import HyperCache, HyperConfig, HyperGLU, build_layer
from hypermlp.ops import hyper_attention
from hypermlp.ops.short_conv import short_conv
from tests.helpers import BACKENDS, STREAMS, Case, assert_close, evaluate, evaluate_layer, make_case, tiles
from tests.oracle import oracle
from tests.quick import combinations

LENGTH = 12
BOUNDS = {
    "stop early": [0, 5, 8],
    "start late": [3, 7, 12],
    "both, with an empty one": [2, 6, 6, 9],
    "empty inside": [0, 5, 5, 12],
    "empty at the ends": [0, 0, 5, 12, 12],
    "nothing": [4, 4],
}
MODES = ["eager", "compiled"]


def in_mode(mode, function):
    if mode == "eager":
        return function
    torch._dynamo.reset()  # else the cases of other tests use up the limit of recompilations
    return torch.compile(function, backend="eager", fullgraph=True)


def outside(bounds):
    positions = torch.arange(LENGTH)
    return (positions < bounds[0]) | (positions >= bounds[-1])


def with_junk(case: Case, bounds) -> Case:
    """NaN in all that tokens outside the bounds hold."""
    hidden = outside(bounds).reshape(1, -1, 1, 1)
    return case.with_tensors({n: torch.where(hidden, float("nan"), x) for n, x in case.tensors.items() if n in STREAMS})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
@pytest.mark.parametrize("chosen", [{}, {"layout": "position"}, {"causal": False}, {"max_lag": 3, "selection": "relu"}])
@pytest.mark.parametrize("masked", [False, True])
def test_the_operator_equals_the_definition(backend, bounds, chosen, masked):
    assert_equals_the_definition("eager", backend, bounds, chosen, masked)


@pytest.mark.parametrize(
    ("backend", "bounds"),
    combinations(
        BACKENDS, BOUNDS, quick=lambda backend, bounds: backend == "chunked" or bounds == "both, with an empty one"
    ),
)
def test_the_compiled_operator_equals_the_definition(backend, bounds):
    assert_equals_the_definition("compiled", backend, BOUNDS[bounds], {}, False)


def assert_equals_the_definition(mode, backend, bounds, chosen, masked):
    case, cu_seqlens = make_case(length=LENGTH, **chosen), torch.tensor(bounds, dtype=torch.int32)
    mask = torch.ones(1, LENGTH, dtype=torch.bool)
    mask[:, [4, 7]] = not masked
    expected = evaluate(case, lambda c: oracle(c, mask, cu_seqlens) + 0 * sum(x.sum() for x in c.tensors.values()))
    options = {"cu_seqlens": cu_seqlens, "attention_mask": mask if masked else None}
    with tiles(3):
        found = evaluate(with_junk(case, bounds), lambda c: c.run(backend, in_mode(mode, hyper_attention), **options))
    assert_close(found.named(), expected.named())
    for name, x in {"output": found.output, **found.streams}.items():
        assert not x[:, outside(bounds)].any(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_come_to_padding_go_nowhere(backend):
    """Whatever is done with the zeros of tokens outside, a NaN included, reaches no valid token."""
    case, bounds = make_case(length=LENGTH), BOUNDS["both, with an empty one"]
    weight = torch.randn(case.tensors["v"].shape, dtype=torch.float64)
    expected = evaluate(case, lambda c: c.run(backend, cu_seqlens=torch.tensor(bounds)), weight)
    weight[:, outside(bounds)] = float("nan")
    found = evaluate(case, lambda c: c.run(backend, cu_seqlens=torch.tensor(bounds)), weight)
    assert all(torch.equal(x, expected.named()[name]) for name, x in found.named().items())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
def test_the_convolution_of_each_sequence_is_its_own(mode, bounds):
    x, taps = torch.randn(1, LENGTH, 3, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    weight = torch.randn_like(x)
    x[:, outside(bounds)] = float("nan")
    x, taps = x.requires_grad_(), taps.requires_grad_()
    y = in_mode(mode, short_conv)(x, taps, torch.tensor(bounds))
    alone = [short_conv(x[:, lo:hi], taps) for lo, hi in pairwise(bounds) if hi > lo]
    before, after = x.new_zeros(1, bounds[0], 3), x.new_zeros(1, LENGTH - bounds[-1], 3) + 0 * taps.sum()
    expected = torch.cat((before, *alone, after), dim=1)
    torch.testing.assert_close(y, expected)
    found = torch.autograd.grad(y, (x, taps), weight)
    wanted = torch.autograd.grad(expected, (x, taps), weight, materialize_grads=True, allow_unused=True)
    torch.testing.assert_close(found, wanted)
    assert not found[0][:, outside(bounds)].any()


LAYERS = {
    "hyperglu": HyperConfig(8, max_lag=LENGTH, mix_rank=2, bias=True, rope=True, qk_dim=8),
    "position": HyperConfig(8, max_lag=LENGTH, mix_rank=2, layout="position"),
    "bidirectional": HyperConfig(8, max_lag=LENGTH, mix_rank=2, causal=False),
    "softmax": HyperConfig(8, mixer="softmax", bias=True, rope=True, conv_size=3),
}


# compiled: every layer with the bounds that have it all, one layer with no sequence that holds a token
FOLLOW = combinations(
    MODES, LAYERS, BOUNDS,
    quick=lambda mode, layer, bounds: mode == "eager"
    or bounds == "both, with an empty one" or (layer, bounds) == ("hyperglu", "nothing"),
)  # fmt: skip


@pytest.mark.parametrize(("mode", "name", "bounds"), FOLLOW)
def test_layers_follow(mode, name, bounds):
    layer, bounds = build_layer(LAYERS[name], dtype=torch.float64), BOUNDS[bounds]
    x, weight = (torch.randn(1, LENGTH, 8, dtype=torch.float64) for _ in range(2))
    x[:, outside(bounds)] = float("nan")

    def alone(x):
        parts = [layer(x[:, lo:hi]) for lo, hi in pairwise(bounds) if hi > lo]
        nothing = 0 * sum(p.sum() for p in layer.parameters())
        before, after = x.new_zeros(1, bounds[0], 8), x.new_zeros(1, LENGTH - bounds[-1], 8)
        return torch.cat((before + nothing, *parts, after + nothing), dim=1) + 0 * torch.where(x.isnan(), 0, x)

    def packed(x):
        return in_mode(mode, layer.forward)(x, cu_seqlens=torch.tensor(bounds))

    found = evaluate_layer(_Called(layer, packed), x, weight)
    expected = evaluate_layer(_Called(layer, alone), x, weight)
    assert_close(found.named(), expected.named())
    assert not found.output[:, outside(bounds)].any()
    assert not found.streams["hidden_states"][:, outside(bounds)].any()


class _Called(torch.nn.Module):
    """A layer's parameters with another forward."""

    def __init__(self, layer, forward):
        super().__init__()
        self.layer, self._forward = layer, forward

    def forward(self, x):
        return self._forward(x)


def test_a_cache_takes_an_empty_sequence_as_a_row():
    torch.manual_seed(0)
    layer = HyperGLU(8, max_lag=LENGTH, mix_rank=2, layer_idx=0, dtype=torch.float64)
    x, new = torch.randn(1, LENGTH, 8, dtype=torch.float64), torch.randn(3, 1, 8, dtype=torch.float64)
    x[:, 9:] = float("nan")
    with torch.no_grad():
        cache = HyperCache()
        layer(x, cu_seqlens=torch.tensor([0, 5, 5, 9]), cache=cache)
        found = layer(new, cache=cache)
        rows = [torch.cat((x[:, lo:hi], new[n : n + 1]), dim=1) for n, (lo, hi) in enumerate([(0, 5), (5, 5), (5, 9)])]
        expected = torch.cat([layer(row)[:, -1:] for row in rows])
    torch.testing.assert_close(found, expected)
