"""Inputs for the short convolution, over awkward shapes and strides."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hypermlp.ops.short_conv import short_conv


@dataclass
class Conv:
    """Inputs of one call."""

    T: int = 40
    B: int = 2
    D: int = 18
    size: int = 4
    past: bool = False
    bounds: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float64
    change: Callable[[Tensor], Tensor] = lambda x: x

    def tensors(self, device: str = "cpu") -> list[Tensor]:
        """x, taps and, where there is one, past."""
        rng = torch.Generator().manual_seed(0)
        shapes = [(self.B, self.T, self.D), (self.D, self.size), (self.B, self.size - 1, self.D)]
        made = [torch.randn(shape, generator=rng, dtype=torch.float64).to(device, self.dtype) for shape in shapes]
        return made if self.past else made[:2]

    def run(self, backend: str, tensors: list[Tensor]) -> list[Tensor]:
        """The output and the gradients of all tensors."""
        tensors = [x.detach().requires_grad_() for x in tensors]
        cu_seqlens = (
            None if self.bounds is None else torch.tensor(self.bounds, dtype=torch.int32, device=tensors[0].device)
        )
        x, taps, past = (*tensors, None)[:3]
        y = short_conv(self.change(x), self.change(taps), cu_seqlens, past, backend)
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        # a past of no tokens is no part of what PyTorch's operators compute
        grads = torch.autograd.grad(y, tensors, self.change(weight.to(y)), materialize_grads=True)
        return [y.detach(), *grads]


def strided_last(x: Tensor) -> Tensor:
    """Every second number of a row."""
    return torch.stack([x, torch.full_like(x, float("nan"))], -1)[..., 0]


def tokens_first(x: Tensor) -> Tensor:
    """Memory in another order."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def beside_others(x: Tensor) -> Tensor:
    """In the first half of wider rows."""
    return torch.cat([x, torch.full_like(x, float("nan"))], -1)[..., : x.shape[-1]]


CASES = {
    **{f"T{length}": Conv(T=length) for length in (1, 2, 3, 15, 16, 17, 65)},
    **{f"size{size}": Conv(T=19, size=size) for size in (1, 2, 3, 5, 9)},
    "longer-than-the-sequence": Conv(T=2, size=7),
    **{f"D{channels}": Conv(T=20, D=channels) for channels in (1, 3, 16, 33)},
    "past": Conv(T=20, past=True),
    "past-one-token": Conv(T=1, past=True),
    "past-one-tap": Conv(T=5, size=1, past=True),
    "past-beyond-a-block": Conv(T=3, size=20, past=True, D=5),
    "packed": Conv(B=1, bounds=(0, 1, 3, 17, 40)),
    "packed-all-alone": Conv(B=1, T=6, bounds=(0, 1, 2, 3, 4, 5, 6)),
    "packed-empty": Conv(B=1, T=20, bounds=(0, 7, 7, 20), size=5),
    "packed-within": Conv(B=1, T=37, bounds=(3, 20, 20, 33)),
    "packed-of-nothing": Conv(B=1, T=20, bounds=(7, 7)),
    "packed-whole": Conv(B=1, T=33, bounds=(0, 33)),
    **{change.__name__: Conv(T=20, change=change) for change in (strided_last, tokens_first, beside_others)},
}
HALVES = (torch.bfloat16, torch.float16)
