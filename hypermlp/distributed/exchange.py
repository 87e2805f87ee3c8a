"""What processes send one another of a sequence: process ``r`` of ``W`` has the chunks ``r`` and ``2W - 1 - r``.

Every function's gradient is sent back the same way, and it has gradients of any order.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

# PyTorch 2.13 gave it another name; gloo has not always had the one of lists
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def chunk_part(x: Tensor, rank: int, world: int, dim: int = 1) -> Tensor:
    """Process ``rank``'s rows of the whole."""
    size = x.shape[dim] // (2 * world)
    first, second = rank * size, (2 * world - 1 - rank) * size
    return torch.cat((x.narrow(dim, first, size), x.narrow(dim, second, size)), dim)


def gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The whole ``[B, T, ...]`` of which every process has its rows; gradients of all processes are summed."""
    return cast(Tensor, _Gather.apply(x, group))  # type: ignore[no-untyped-call]


def whole_of_parts(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The same, for what all processes compute alike: the gradient is that of the own rows."""
    return cast(Tensor, _Whole.apply(x, group))  # type: ignore[no-untyped-call]


def before_chunks(x: Tensor, reach: int, group: dist.ProcessGroup) -> Tensor:
    """Both chunks of ``[B, 2 c, ...]``, each with the ``reach`` tokens before it: ``[B, 2, reach + c, ...]``.

    ``reach`` is at most ``c``; those before the first chunk of all are zeros. Neighbours send them: chunk ``r - 1``
    lies on the process before, chunk ``2W - 2 - r`` on the process after, or of the last process here.
    """
    chunks = rearrange(x, "b (two c) ... -> b two c ...", two=2)
    if not reach:
        return chunks
    ends = chunks[:, :, chunks.shape[2] - reach :]
    # the chunk after the first one lies on the next process, that after the second one on the previous
    before: tuple[Tensor, Tensor] = _Swap.apply(ends[:, 1], ends[:, 0], group)  # type: ignore[no-untyped-call]
    return torch.cat((torch.stack(before, dim=1), chunks), dim=2)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _ReduceScatter.apply(grad, ctx.group), None  # type: ignore[no-untyped-call]


class _ReduceScatter(torch.autograd.Function):
    """The own rows of the sum over processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        world = group.size()
        chunks = rearrange(x, "b (n c) ... -> n b c ...", n=2 * world)
        parts = torch.stack((chunks[:world], chunks[world:].flip(0)), dim=2)
        own = torch.empty_like(parts[0])
        _reduce_scatter(own, parts.flatten(0, 1), group=group)
        return own.flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(grad, ctx.group), None  # type: ignore[no-untyped-call]


class _Whole(_Gather):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return chunk_part(grad, ctx.group.rank(), ctx.group.size()), None


class _Swap(torch.autograd.Function):
    """:func:`_swap`, which is its own gradient: what came from a neighbour has its gradient sent back to it."""

    @staticmethod
    def forward(ctx: Any, to_previous: Tensor, to_next: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        ctx.group = group
        return _swap(to_previous, to_next, group)

    @staticmethod
    def backward(ctx: Any, from_previous: Tensor, from_next: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_Swap.apply(from_previous, from_next, ctx.group), None  # type: ignore[no-untyped-call]


def _all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = x.new_empty(group.size(), *x.shape)
    dist.all_gather(list(parts), x.contiguous(), group=group)
    first, second = rearrange(parts, "w b (two c) ... -> two w b c ...", two=2)
    return rearrange(torch.cat((first, second.flip(0))), "n b c ... -> b (n c) ...")


def _swap(to_previous: Tensor, to_next: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """What the process before and the one after send here.

    Nothing comes from before the first process: zeros. Of the last, what it would send on comes back.
    """
    rank, last = group.rank(), group.size() - 1
    from_previous = torch.zeros_like(to_next, memory_format=torch.contiguous_format)
    from_next = to_next.clone(memory_format=torch.contiguous_format)
    messages = []
    for there, mine, theirs in ((rank - 1, to_previous, from_previous), (rank + 1, to_next, from_next)):
        if 0 <= there <= last:
            peer = dist.get_global_rank(group, there)
            messages.append(dist.P2POp(dist.isend, mine.contiguous(), peer, group))
            messages.append(dist.P2POp(dist.irecv, theirs, peer, group))
    if messages:
        for work in dist.batch_isend_irecv(messages):
            work.wait()
    return from_previous, from_next
