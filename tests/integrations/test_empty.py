"""Batches without rows and sequences without tokens: hosts give what their own attention gives, empty tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hypermlp import HyperCache, HyperGLU, swap_attention
from tests.integrations import test_nanogpt as nanogpt
from tests.integrations.packages import package
from tests.integrations.torch_nn.encoders import WIDTH, encoder, triangle

SHAPES = [(0, 5), (2, 0), (0, 0)]


MIXERS = ["hyperglu", "hypermlp", "relu", "softmax"]


def check(model: nn.Module, out: Tensor, expected: Tensor) -> None:
    """Shape and dtype as the host has them; every parameter takes part, with a gradient of zero."""
    assert out.shape == expected.shape
    assert out.dtype == expected.dtype
    out.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mixer", MIXERS)
def test_encoders(mixer: Any, shape: tuple[int, int], causal: bool, batch_first: bool) -> None:
    model = encoder(batch_first=batch_first)
    x = torch.zeros(*(shape if batch_first else shape[::-1]), WIDTH)
    expected = model(x)
    swap_attention(model, mixer, causal=causal, **({} if mixer == "softmax" else {"max_lag": 8}))
    mask = (triangle(shape[1]) != 0) if causal else None
    check(model.train(), model(x, mask=mask), expected)
    check(model.train(), model(x, mask=mask, src_key_padding_mask=torch.zeros(shape, dtype=torch.bool)), expected)
    with torch.no_grad():
        assert model.eval()(x, mask=mask).shape == expected.shape


@pytest.mark.parametrize("mixer", MIXERS)
def test_unbatched_and_maps(mixer: Any) -> None:
    model = encoder()
    swap_attention(model, mixer, **({} if mixer == "softmax" else {"max_lag": 8}))
    attention = model.layers[0].self_attn
    for shape in ((0,), *SHAPES):
        x = torch.zeros(*shape, WIDTH)
        out, maps = attention(x, x, x)
        assert out.shape == x.shape
        assert maps.shape == (*shape, shape[-1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mixer", MIXERS)
def test_nanogpt(mixer: Any, shape: tuple[int, int]) -> None:
    model, ids = nanogpt.stock(), torch.zeros(shape, dtype=torch.long)
    expected = model(ids)[0]
    swap_attention(model, mixer)
    check(model.train(), model(ids)[0], expected)


def test_timm() -> None:
    timm = package("tests.integrations.test_timm")
    pixels = torch.zeros(0, 3, 16, 16)
    model = timm.swapped()
    check(model, model(pixels), timm.stock()(pixels))


def test_no_token_leaves_a_cache_as_it_is() -> None:
    layer, cache = HyperGLU(16, 2, max_lag=8, layer_idx=0), HyperCache()
    with torch.no_grad():
        for length in (0, 3, 0):
            assert layer(torch.zeros(2, length, 16), cache=cache).shape == (2, length, 16)
    assert cache.get_seq_length() == 3
