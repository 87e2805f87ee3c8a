"""Memory for the tokens so far: grows by doubling, then overwrites the oldest."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_FIRST_CAPACITY = 64


class Ring:
    """Rows ``[B, heads, slots, width]`` by token number: token ``t`` lies in slot ``t % capacity``.

    Args:
        like: ``[B, heads, any, width]``, for sizes, dtype and device.
        limit: tokens it keeps at most; None for all.
        slots_last: keep a row's numbers a capacity apart, so that a product over all slots reads
            memory in order; what goes in and comes out has the same shape either way.

    Attributes:
        data: the memory, ``[B, heads, slots, width]``, or ``[B, heads, width, slots]``.
        oldest: number of the oldest token that has not been overwritten; 0 until the ring wraps.
    """

    def __init__(self, like: Tensor, limit: int | None, slots_last: bool = False) -> None:
        self.limit, self.slots_last, self.oldest = limit, slots_last, 0
        self.data = self._allocate(like, _FIRST_CAPACITY if limit is None else min(_FIRST_CAPACITY, limit))

    @property
    def capacity(self) -> int:
        return self.data.shape[3 if self.slots_last else 2]

    def append(self, rows: Tensor, length: int) -> None:
        """Write ``[B, heads, m, width]`` after the ``length`` tokens there have been."""
        new = rows.shape[2]
        total = length + new
        self._grow(length, total)
        capacity = self.capacity
        self.oldest = max(self.oldest, total - capacity)
        if self.data.is_inference() and not torch.is_inference_mode_enabled():
            self.data = self.data.clone()  # made under inference_mode, it could not be written outside
        if new == 1:
            self._slots(length % capacity, 1).copy_(rows)
            return
        first = max(length, total - capacity)
        done = first - length
        for low, count in self._spans(first, total):
            self._slots(low, count).copy_(rows.narrow(2, done, count))
            done += count

    def fits(self, rows: Tensor) -> bool:
        """Whether ``rows`` have this memory's batch, dtype and device."""
        data = self.data
        return (rows.shape[0], rows.dtype, rows.device) == (data.shape[0], data.dtype, data.device)

    def tokens(self, start: int, stop: int) -> list[Tensor]:
        """Views of tokens ``start:stop``, oldest first: one, or two where the ring wraps."""
        low, count = start % self.capacity, stop - start
        if low + count <= self.capacity:
            return [self._slots(low, count)]
        return [self._slots(*span) for span in self._spans(start, stop)]

    def _slots(self, low: int, count: int) -> Tensor:
        """View ``[B, heads, count, width]``."""
        if self.slots_last:
            return self.data.narrow(3, low, count).mT
        return self.data.narrow(2, low, count)

    def _spans(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """First slot and number of slots of each contiguous stretch."""
        capacity = self.capacity
        while start < stop:
            low = start % capacity
            count = min(capacity - low, stop - start)
            yield low, count
            start += count

    def _grow(self, length: int, needed: int) -> None:
        if needed <= self.capacity or (self.limit is not None and self.capacity >= self.limit):
            return
        capacity = max(needed, 2 * self.capacity)
        old = self._slots(0, length)
        self.data = self._allocate(old, capacity if self.limit is None else min(capacity, self.limit))
        self._slots(0, length).copy_(old)

    def _allocate(self, like: Tensor, capacity: int) -> Tensor:
        batch, heads, _, width = like.shape
        return like.new_zeros(batch, heads, *((width, capacity) if self.slots_last else (capacity, width)))
