"""One door and one object: who is there is checked once, and padding is made zero on the way in and on the way out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hypermlp import HyperCache, HyperGLU, HyperMLP, ReLUAttention, SoftmaxAttention
from hypermlp.layers import AttentionLayer
from hypermlp.ops import checks

LAYERS = [HyperGLU, HyperMLP, ReLUAttention, SoftmaxAttention]
D, T = 32, 9
MASK = torch.tensor([[0, 0] + [1] * 7, [1] * 4 + [0] + [1] * 2 + [0] * 2])
BOUNDS = torch.tensor([1, 4, 8])


class Zeroings(TorchDispatchMode):
    """Counts passes over ``[B, T, ...]`` that choose between a tensor's rows and zero."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        chooses = func in (torch.ops.aten.where.self, torch.ops.aten.masked_fill.Scalar)
        self.count += chooses and out.is_floating_point() and out.ndim >= 3 and out.shape[1] == T
        return out


def build(cls: type[AttentionLayer], **options: Any) -> AttentionLayer:
    layer = cls(D, max_lag=12, conv_size=3, bias=True, layer_idx=0, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return layer


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("backend", ["chunked", "native"])
@pytest.mark.parametrize("cached", [False, True])
@torch.no_grad()
def test_padding_is_zeroed_once_in_once_as_keys_and_values_and_once_out(
    cls: type[AttentionLayer], backend: Any, cached: bool
) -> None:
    layer = build(cls, backend=backend)
    with Zeroings() as found:
        layer(torch.randn(2, T, D), MASK, cache=HyperCache() if cached else None)
    assert found.count == 4
    with Zeroings() as found:
        layer(torch.randn(2, T, D), torch.ones_like(MASK), cache=HyperCache() if cached else None)
    assert found.count == 0, "a mask that hides nothing"


@pytest.mark.parametrize("mask", [None, MASK[1:]])
@torch.no_grad()
def test_packed_tokens_outside_are_zeroed_with_the_masked_ones(mask: Tensor | None) -> None:
    layer = build(HyperGLU, backend="native")
    with Zeroings() as found:
        layer(torch.randn(1, T, D), mask, cu_seqlens=BOUNDS)
    assert found.count == (2 if mask is None else 4)


@contextmanager
def checks_counted() -> Iterator[dict[str, mock.Mock]]:
    names = ("check_attention_mask", "check_cu_seqlens", "check_streams")
    with mock.patch.multiple(checks, **{name: mock.Mock(wraps=getattr(checks, name)) for name in names}):
        yield {name: getattr(checks, name) for name in names}


@pytest.mark.parametrize("cls", LAYERS)
def test_everything_is_checked_once(cls: type[AttentionLayer]) -> None:
    with checks_counted() as found:
        build(cls)(torch.randn(1, T, D), MASK[1:], cu_seqlens=BOUNDS)
    assert {name: check.call_count for name, check in found.items()} == {
        "check_attention_mask": 1,
        "check_cu_seqlens": 1,
        "check_streams": int(cls is not SoftmaxAttention),
    }


@pytest.mark.parametrize("junk", [1e30, float("nan"), float("inf")])
@pytest.mark.parametrize("backend", ["reference", "chunked", "native"])
@pytest.mark.parametrize("packed", [False, True])
def test_what_padding_holds_reaches_nothing(backend: Any, junk: float, packed: bool) -> None:
    """Bit for bit the outputs and every gradient, with biases and gates that make something of zeros."""
    layer, rows = build(HyperGLU, backend=backend, rope=True), slice(1, 2) if packed else slice(0, 2)
    mask, bounds = MASK[rows], BOUNDS if packed else None
    hidden = mask == 0
    if packed:
        hidden = hidden | (torch.arange(T) < BOUNDS[0]) | (torch.arange(T) >= BOUNDS[-1])
    x, weight = torch.randn(*mask.shape, D), torch.randn(*mask.shape, D)

    def evaluated(held: float, came: float) -> list[Tensor]:
        inputs = x.masked_fill(hidden[..., None], held).requires_grad_()
        out = layer(inputs, mask, cu_seqlens=bounds)
        grads = torch.autograd.grad(out, [inputs, *layer.parameters()], weight.masked_fill(hidden[..., None], came))
        return [out, *grads]

    expected, found = evaluated(0.0, 0.0), evaluated(junk, junk)
    assert all(torch.equal(y, z) for y, z in zip(found, expected, strict=True))
    assert not found[0][hidden].any()
    assert not found[1][hidden].any()


@pytest.mark.parametrize("cls", LAYERS)
def test_a_mask_that_is_no_tensor_is_refused_by_name(cls: type[AttentionLayer]) -> None:
    for cache in (None, HyperCache()):
        with pytest.raises(TypeError, match="attention_mask must be a tensor, got list"), torch.no_grad():
            build(cls)(torch.randn(1, 2, D), [[1, 1]], cache=cache)


@pytest.mark.parametrize("cls", LAYERS[:3])
@pytest.mark.parametrize("backend", ["reference", "chunked", "native"])
@torch.no_grad()
def test_a_masked_token_brings_no_nan_of_an_earlier_one_into_the_window(
    cls: type[AttentionLayer], backend: Any
) -> None:
    """Its convolutions saw a NaN that the row itself does not: the row is as if the masked token were not there."""
    layer = cls(D, max_lag=3, conv_size=2, layer_idx=0, backend=backend)
    x, mask = torch.randn(1, T, D), torch.ones(1, T, dtype=torch.bool)
    mask[0, 4] = False
    nan = x.clone()
    nan[0, 3] = float("nan")
    out = layer(nan, mask)
    assert out[0, 3].isnan().all()
    assert torch.equal(out[0, 6:], layer(x, mask)[0, 6:])
