"""Memory for the tokens so far: grows by doubling, then overwrites the oldest."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

_FIRST_CAPACITY = 64


class Ring:
    """Rows ``[B, heads, slots, width]`` by token number: token ``t`` lies in slot ``t % capacity``.

    Args:
        like: ``[B, heads, any, width]``, for sizes, dtype and device.
        limit: tokens it keeps at most; None for all.
    """

    def __init__(self, like: Tensor, limit: int | None) -> None:
        self.limit = limit
        self.data = self._allocate(like, _FIRST_CAPACITY if limit is None else min(_FIRST_CAPACITY, limit))

    @property
    def capacity(self) -> int:
        return self.data.shape[2]

    def append(self, rows: Tensor, length: int) -> None:
        """Write ``[B, heads, m, width]`` after the ``length`` tokens there have been."""
        total = length + rows.shape[2]
        self._grow(length, total)
        first = max(length, total - self.capacity)
        rows = rows[:, :, first - length :]
        done = 0
        for low, high in self._spans(first, total):
            self.data[:, :, low:high] = rows[:, :, done : done + high - low]
            done += high - low

    def tokens(self, start: int, stop: int) -> list[Tensor]:
        """Views of tokens ``start:stop``, oldest first: one, or two where the ring wraps."""
        return [self.data[:, :, low:high] for low, high in self._spans(start, stop)] or [self.data[:, :, :0]]

    def _spans(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        while start < stop:
            low = start % self.capacity
            high = min(self.capacity, low + stop - start)
            yield low, high
            start += high - low

    def _grow(self, length: int, needed: int) -> None:
        if needed <= self.capacity or self.capacity == self.limit:
            return
        capacity = max(needed, 2 * self.capacity)
        old = self.data
        self.data = self._allocate(old, capacity if self.limit is None else min(capacity, self.limit))
        self.data[:, :, :length] = old[:, :, :length]

    @staticmethod
    def _allocate(like: Tensor, capacity: int) -> Tensor:
        return like.new_zeros(like.shape[0], like.shape[1], capacity, like.shape[3])
