"""Groups of processes, what layers know of theirs, and sums over one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from hypermlp.checks import check_kind
from hypermlp.layers import AttentionLayer


class _Sum(torch.autograd.Function):
    """The sum over the group, taken of the values or else of their gradient; the other of the two is left as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, of_values: bool) -> Tensor:
        ctx.group, ctx.of_values = group, of_values
        if not of_values:
            return x.view_as(x)
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Sum.apply(grad, ctx.group, not ctx.of_values), None, None  # type: ignore[no-untyped-call]


def copied(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``x``; its gradient is summed over ``group``: enters what differs by process."""
    return cast(Tensor, _Sum.apply(x, group, False))  # type: ignore[no-untyped-call]


def summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``x`` summed over ``group``; its gradient is left as it is: leaves what differs by process."""
    return cast(Tensor, _Sum.apply(x, group, True))  # type: ignore[no-untyped-call]


class Group(NamedTuple):
    """The processes of a sharded layer. A copy of the layer, such as a moving average, shares them."""

    processes: dist.ProcessGroup

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return self


def process_group(group: DeviceMesh | dist.ProcessGroup | None) -> dist.ProcessGroup:
    if group is None:
        if not dist.is_initialized():
            raise ValueError("there is no process group: call torch.distributed.init_process_group first")
        return cast(dist.ProcessGroup, dist.group.WORLD)
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"group must be a mesh of one dimension, got {group.ndim}: choose one, such as mesh['tp']")
        return group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a DeviceMesh, a ProcessGroup or None, got {type(group).__name__}")
    return group


def attention_layers(module: nn.Module) -> Iterator[tuple[str, AttentionLayer]]:
    check_kind("module", module, nn.Module)
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, AttentionLayer))


def layers_to_shard(module: nn.Module) -> dict[str, AttentionLayer]:
    """The attention layers by their path; ValueError where there is none."""
    layers = dict(attention_layers(module))
    if not layers:
        raise ValueError(f"{type(module).__name__} has no attention layer of hypermlp: swap or build them first")
    return layers
