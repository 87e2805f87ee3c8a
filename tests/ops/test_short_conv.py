"""The short convolution as a function: what it refuses, and that its past is what went before."""

from __future__ import annotations

import pytest
import torch

from hypermlp import HyperGLU, SoftmaxAttention
from hypermlp.ops.short_conv import short_conv

x, taps = torch.randn(2, 9, 3).double(), torch.randn(3, 4).double()


@pytest.mark.parametrize("split", [3, 5, 8])
def test_past_is_what_went_before(split):
    after = short_conv(x[:, split:], taps, past=x[:, split - 3 : split])
    torch.testing.assert_close(after, short_conv(x, taps)[:, split:])


def test_gradients_in_float64():
    tensors = [y.clone().requires_grad_() for y in (x, taps, x[:, :3])]
    torch.autograd.gradcheck(lambda x, taps, past: short_conv(x, taps, past=past), tensors)
    torch.autograd.gradgradcheck(lambda x, taps: short_conv(x[:1, :5], taps, torch.tensor([0, 2, 5])), tensors[:2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((x[0], taps), r"x must be \[B, T, D\] and taps \[D, size\].* got \(9, 3\), \(3, 4\)"),
        ((x, taps[:2]), r"got \(2, 9, 3\), \(2, 4\)"),
        ((x, taps[:1]), r"got \(2, 9, 3\), \(1, 4\)"),
        ((x, taps[:, :0]), "size at least 1"),
        ((x, taps.to("meta")), "taps are on meta and x on cpu"),
        ((x, taps, None, x[:, :2]), r"past must be \[B, size - 1, D\], \(2, 3, 3\), got \(2, 2, 3\)"),
        ((x, taps, None, x[:1, :3]), r"got \(1, 3, 3\)"),
        ((x[:1], taps, torch.tensor([0, 9]), x[:1, :3]), "past is for a batch with one sequence a row"),
        ((x, taps, None, None, "fused"), r"backend must be one of .*, got 'fused'"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_bad_input_is_refused_with_the_reason(arguments, message, backend):
    if len(arguments) < 5:
        arguments = (*arguments, *[None] * (4 - len(arguments)), backend)
    with pytest.raises(ValueError, match=message):
        short_conv(*arguments)


@pytest.mark.parametrize(
    ("bounds", "error", "message"),
    [
        (torch.tensor([-3, 9]), ValueError, "cu_seqlens must lie within 0 and 9 tokens, got -3 to 9"),
        (torch.tensor([0, 12]), ValueError, "got 0 to 12"),
        (torch.tensor([0, 5, 2, 9]), ValueError, "must not decrease"),
        (torch.tensor([], dtype=torch.int32), ValueError, r"must be \[N \+ 1\]"),
        ([0, 9], TypeError, "cu_seqlens must be a tensor"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "native", "chunked"])
def test_bounds_are_within_the_tokens(bounds, error, message, backend, native_path):
    with pytest.raises(error, match=message):
        short_conv(x[:1].float(), taps.float(), bounds, backend=backend)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.complex64])
def test_whole_and_complex_numbers_are_taken_as_what_they_are(dtype, native_path):
    numbers = torch.arange(2 * 40 * 5).reshape(2, 40, 5) % 3
    y = short_conv(numbers.to(dtype), torch.ones(5, 2), backend="auto")
    expected = short_conv((numbers.bool() if dtype == torch.bool else numbers).double(), torch.ones(5, 2).double())
    assert torch.equal(y.to(torch.complex128), expected.to(torch.complex128))
    if dtype not in (torch.bool, torch.complex64):
        assert torch.equal(short_conv(numbers.to(dtype), torch.ones(5, 2, dtype=dtype)).double(), expected)


@pytest.mark.parametrize("layer", [HyperGLU(8, max_lag=9), SoftmaxAttention(8, conv_size=4)])
def test_a_layers_convolutions_follow_its_backend(layer):
    hidden_states = torch.randn(1, 9, 8)
    layer(hidden_states)
    layer.backend = "triton"
    with pytest.raises(ValueError, match="backend='triton' cannot run here"):
        layer.keys_values(hidden_states)
