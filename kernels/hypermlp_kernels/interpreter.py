"""What Triton's interpreter can be trusted with, found by trying."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _product_kernel(p_x, p_y, N: tl.constexpr):
    o = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(p_y + o, tl.dot(tl.load(p_x + o), tl.load(p_x + o)))


def multiplies_bfloat16() -> bool:
    """Whether a product of bfloat16 matrices comes out right: up to 3.9 the interpreter multiplies their bits."""
    x: Tensor = torch.eye(16, dtype=torch.bfloat16) * 3
    y = torch.empty(16, 16)
    _product_kernel[(1,)](x, y, N=16)
    return torch.equal(y, torch.eye(16) * 9)
