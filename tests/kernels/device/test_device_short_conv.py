"""The short convolution's kernels on a GPU: the interpreter's cases again, larger ones, compilation."""

import pytest
import torch
from place import DEVICE, DTYPES, ON_GPU
from torch import Tensor

# isort: split
from conv_cases import CASES, Conv

from hypermlp.ops.short_conv import short_conv

gpu_alone = pytest.mark.skipif(not ON_GPU, reason="the interpreter compiles nothing")


def assert_no_worse_than_pytorch(case: Conv, dtype: torch.dtype) -> None:
    """Values and gradients err at most twice as much as PyTorch's operators, or round once."""
    tensors = [x.to(dtype) for x in case.tensors(DEVICE)]
    exact = case.run("reference", [x.double() for x in tensors])
    for ours, plain, truth in zip(case.run("triton", tensors), case.run("reference", tensors), exact, strict=True):
        if truth.numel():
            made, allowed = ((x.double() - truth).abs().max() for x in (ours, plain))
            assert made <= 2 * allowed + torch.finfo(dtype).eps * truth.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_short_conv(name: str, dtype: torch.dtype) -> None:
    assert_no_worse_than_pytorch(CASES[name], dtype)


@gpu_alone
@pytest.mark.parametrize("options", [{}, {"past": True}, {"B": 1, "bounds": (0, 1, 1000, 3001)}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_tokens_and_the_same_bits_every_run(dtype: torch.dtype, options: dict) -> None:
    case = Conv(T=3001, D=256, **options)
    assert_no_worse_than_pytorch(case, dtype)
    tensors = [x.to(dtype) for x in case.tensors(DEVICE)]
    first = case.run("triton", tensors)
    for _ in range(5):
        assert all(torch.equal(one, other) for one, other in zip(first, case.run("triton", tensors), strict=True))


@gpu_alone
def test_compiles_to_one_graph_with_its_gradient() -> None:
    def convolve(x: Tensor, taps: Tensor) -> Tensor:
        return short_conv(x, taps, backend="triton")

    tensors = [x.bfloat16().requires_grad_() for x in Conv(T=130, D=64).tensors(DEVICE)]
    ys = torch.compile(convolve, fullgraph=True)(*tensors), convolve(*tensors)
    torch.testing.assert_close(*ys)
    weight = torch.randn_like(ys[0])
    for one, other in zip(*(torch.autograd.grad(y, tensors, weight) for y in ys), strict=True):
        torch.testing.assert_close(one, other)


@gpu_alone
@pytest.mark.slow
def test_more_than_2_to_the_31_numbers() -> None:
    """The last batch row, past the 32-bit offsets, is computed as if it were alone."""
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of free GPU memory")
    x = torch.randn(5, 1 << 18, 2048, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    taps = torch.randn(2048, 4, device=DEVICE, dtype=torch.bfloat16)
    assert x.numel() > 2**31
    y = short_conv(x, taps, backend="triton")
    (grad,) = torch.autograd.grad(y, x, y)
    alone = short_conv(x[-1:], taps, backend="triton")
    assert torch.equal(y[-1:], alone)
    assert torch.equal(grad[-1:], torch.autograd.grad(alone, x, alone)[0][-1:])
