"""The native path's own numbers: softplus and its slope to the last bits, rows whose squares leave the range."""

from __future__ import annotations

import pytest
import torch

from hypermlp.ops import hyper_attention
from hypermlp.ops.short_conv import short_conv

pytestmark = pytest.mark.usefixtures("native_path")
STEP = torch.finfo(torch.float32).eps


def test_softplus_and_sigmoid_to_three_units_in_the_last_place():
    u = torch.cat((torch.linspace(-87, 90, 20001), torch.linspace(-1, 1, 4001), torch.tensor([0.0, -0.0])))
    q = torch.stack((torch.ones_like(u), u), 1)[:, None, :, None].requires_grad_()
    one = torch.ones_like(q)
    o = hyper_attention(q, one, one[:, :, :1], norm=False, backend="native")
    (grad,) = torch.autograd.grad(o.sum(), q)
    exact = torch.nn.functional.softplus(u.double(), threshold=100)
    slope = torch.sigmoid(u.double())
    assert ((o.double().flatten() - exact) / exact).abs().max() < 3 * STEP
    assert ((grad[:, 0, 1, 0].double() - slope) / slope).abs().max() < 3 * STEP


@pytest.mark.parametrize("u", [-88.0, -104.0, -1e30])
def test_softplus_vanishes_far_below_zero(u):
    q = torch.tensor([1.0, u]).reshape(1, 1, 2, 1)
    one = torch.ones(1, 1, 2, 1)
    mix = hyper_attention(q, one, one[:, :, :1], norm=False, backend="native")
    assert 0 <= float(mix) < torch.finfo(torch.float32).tiny


@pytest.mark.parametrize("size", [1e-34, 1e-25, 1e-19, 1e19, 1e25, 1e36])
def test_rows_whose_squares_leave_the_range_are_normalised(size):
    """relu(s) / ||s|| does not know how large s is; nor does its gradient times the size."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 40, 2, 3), torch.randn(1, 40, 2, 3), torch.randn(1, 40, 2, 5)
    weight = torch.randn(1, 40, 2, 5)
    tiny = torch.finfo(torch.float32).smallest_normal

    def run(q: torch.Tensor, backend: str, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        q = q.requires_grad_()
        o = hyper_attention(q, k.to(q), v.to(q), selection="relu", eps=eps, backend=backend)
        return o.detach(), torch.autograd.grad(o, q, weight.to(q))[0]

    o, grad = run(q * size, "native", tiny)
    exact, exact_grad = run(q.double(), "reference", 1e-12)
    torch.testing.assert_close(o.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double() * size, exact_grad, rtol=1e-4, atol=1e-4)


def test_a_row_below_eps_is_divided_by_eps():
    q, one = torch.full((1, 1, 1, 1), 1e-15), torch.ones(1, 1, 1, 1)
    o = hyper_attention(q, one, one, selection="relu", eps=1e-12, backend="native")
    torch.testing.assert_close(o, q / 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["whole", "packed", "after a past"])
def test_the_convolution_converts_as_it_reads(dtype, kind):
    """To the bit what float32 gives of the same numbers, rounded at the end: several blocks, any order in memory."""
    length, size, channels = 600, 4, 19
    generator = torch.Generator().manual_seed(0)
    shapes = (channels, 2, length), (channels, size), (2, size - 1, channels), (2, length, channels)
    x, taps, past, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    x = x.permute(1, 2, 0)
    chosen = {
        "whole": {},
        "packed": {"cu_seqlens": torch.tensor([0, 254, 257, length])},
        "after a past": {"past": past},
    }
    found = []
    for kept in (dtype, torch.float32):
        given = {name: y.to(kept) if name == "past" else y for name, y in chosen[kind].items()}
        inputs = [y.to(kept).requires_grad_() for y in (x[:1] if kind == "packed" else x, taps)]
        y = short_conv(*inputs, **given, backend="native")
        found.append([y, *torch.autograd.grad(y, inputs, weight[: y.shape[0]].to(kept))])
    for low, exact in zip(*found, strict=True):
        assert low.dtype == dtype
        assert torch.equal(low, exact.to(dtype))
