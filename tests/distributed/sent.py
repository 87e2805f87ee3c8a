"""What a process sends for its sequences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

from hypermlp.distributed import exchange


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Numbers that this process sends, by kind of message: to each of the others, what goes there."""
    sent = {"gather": 0, "scatter": 0, "neighbours": 0}
    gather, scatter, swap = dist.all_gather, exchange._reduce_scatter, dist.batch_isend_irecv
    others = dist.get_world_size() - 1

    def all_gather(out: list[Tensor], x: Tensor, **kwargs: Any) -> Any:
        sent["gather"] += x.numel() * others
        return gather(out, x, **kwargs)

    def reduce_scatter(out: Tensor, x: Tensor, **kwargs: Any) -> Any:
        sent["scatter"] += out.numel() * others
        return scatter(out, x, **kwargs)

    def neighbours(messages: list[dist.P2POp]) -> Any:
        sent["neighbours"] += sum(message.tensor.numel() for message in messages if message.op is dist.isend)
        return swap(messages)

    with (
        mock.patch.multiple(dist, all_gather=all_gather, batch_isend_irecv=neighbours),
        mock.patch.object(exchange, "_reduce_scatter", reduce_scatter),
    ):
        yield sent
