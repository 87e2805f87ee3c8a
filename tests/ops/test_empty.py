"""No batch rows, or no tokens: outputs of the right shape and dtype, and zero gradients, everywhere."""

from __future__ import annotations

import pytest
import torch

from hypermlp import HyperCache, HyperConfig, build_layer
from hypermlp.ops.short_conv import short_conv
from tests.helpers import BACKENDS, STREAMS, make_case
from tests.quick import combinations

SIZES = [(0, 6), (2, 0), (0, 0)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "length"), SIZES)
@pytest.mark.parametrize("chosen", [{}, {"causal": False}, {"selection": "relu", "norm": False}])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_operator(backend, batch, length, chosen, masked, dtype):
    full = make_case(batch=2, length=6, dtype=dtype, **chosen)
    case = full.with_tensors({n: x[:batch, :length] for n, x in full.tensors.items() if n in STREAMS})
    case = case.map(lambda x: x.detach().clone().requires_grad_())
    mask = torch.ones(batch, length, dtype=torch.int64) if masked else None
    o = case.run(backend, attention_mask=mask)
    assert o.shape == case.tensors["v"].shape
    assert o.dtype == dtype
    o.sum().backward()
    for x in case.tensors.values():
        assert x.grad.shape == x.shape
        assert not x.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_of_no_tokens(backend):
    case = make_case(length=0, max_lag=4)
    assert case.run(backend, cu_seqlens=torch.tensor([0, 0, 0])).shape == (1, 0, 2, 4)


@pytest.mark.parametrize(("batch", "length"), SIZES)
def test_the_convolution(batch, length):
    x = torch.randn(batch, length, 3, requires_grad=True)
    taps = torch.randn(3, 4, requires_grad=True)
    y = short_conv(x, taps)
    assert y.shape == x.shape
    y.sum().backward()
    assert not taps.grad.any()


LAYERS = combinations(
    ["eager", "compiled"], SIZES, ["hyperglu", "hypermlp", "relu", "softmax"], [True, False],
    quick=lambda mode, size, mixer, causal: mode == "eager" or (size, mixer, causal) == ((0, 6), "hyperglu", True),
)  # fmt: skip


@pytest.mark.parametrize(("mode", "size", "mixer", "causal"), LAYERS)
def test_layers(mode, size, mixer, causal):
    batch, length = size
    config = HyperConfig(8, mixer=mixer, max_lag=9, causal=causal, bias=True, rope=True, qk_dim=8, conv_size=3)
    layer = build_layer(config)
    x = torch.randn(batch, length, 8, requires_grad=True)
    if mode == "compiled":
        torch._dynamo.reset()
    forward = torch.compile(layer, backend="aot_eager", fullgraph=True) if mode == "compiled" else layer
    for mask in (None, torch.ones(batch, length, dtype=torch.bool)):
        y = forward(x, mask)
        assert y.shape == x.shape
        y.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("mixer", ["hyperglu", "hypermlp", "relu", "softmax"])
@torch.no_grad()
def test_blocks_and_steps_after_a_cache_of_no_rows(mixer):
    layer = build_layer(HyperConfig(8, mixer=mixer, max_lag=9), layer_idx=0)
    cache = HyperCache()
    for new in (3, 2, 0, 1):
        assert layer(torch.randn(0, new, 8), cache=cache).shape == (0, new, 8)
