"""The two sums over processes that tensor parallelism needs, each the other's gradient."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor


class _Copied(torch.autograd.Function):
    """Identity, whose gradient is the sum over the group: enters what differs by process."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return summed(grad, ctx.group), None


class _Summed(torch.autograd.Function):
    """Sum over the group, whose gradient is the identity: leaves what differs by process."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return copied(grad, ctx.group), None


def copied(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``x``; its gradient is summed over ``group``."""
    return cast(Tensor, _Copied.apply(x, group))  # type: ignore[no-untyped-call]


def summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``x`` summed over ``group``; its gradient is left as it is."""
    return cast(Tensor, _Summed.apply(x, group))  # type: ignore[no-untyped-call]
