"""Memory for the tokens so far: grows by doubling, then overwrites the oldest."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_FIRST_CAPACITY = 64


class Ring:
    """Rows ``[B, ..., slots, width]`` by token number: token ``t`` lies in slot ``t % capacity``.

    Args:
        like: ``[B, ..., any, width]``, for sizes, dtype and device.
        limit: tokens it keeps at most; None for all.
        slots_last: keep a row's numbers a capacity apart, so that a product over all slots reads
            memory in order.

    Attributes:
        capacity: slots there are.
        oldest: number of the oldest token that has not been overwritten; 0 until the ring wraps.
        batch_size, dtype, device: of the memory.
    """

    def __init__(self, like: Tensor, limit: int | None, slots_last: bool = False) -> None:
        self.limit, self.slots_last, self.oldest = limit, slots_last, 0
        self._slots_dim = -1 if slots_last else -2
        self.data = self._allocate(like, _FIRST_CAPACITY if limit is None else min(_FIRST_CAPACITY, limit))

    @property
    def data(self) -> Tensor:
        """The memory, ``[B, ..., slots, width]``, or ``[B, ..., width, slots]``."""
        return self._rows.view(*self._leading, *self._rows.shape[1:])

    @data.setter
    def data(self, data: Tensor) -> None:
        # held with heads beside batch rows, as products take them: a view costs a step as much as arithmetic
        self._leading, self._rows = data.shape[:-2], data.flatten(0, -3)
        self.capacity = data.shape[self._slots_dim]
        # plain attributes: every step compares them
        self.batch_size, self.dtype, self.device = data.shape[0], data.dtype, data.device

    def put(self, token: Tensor, length: int) -> None:
        """Write one token ``[B, ... * width]`` after the ``length`` tokens there have been."""
        self._make_room(length, length + 1)
        slot = self._rows.select(self._slots_dim, length % self.capacity)
        slot.copy_((token.detach() if token.requires_grad else token).view_as(slot))

    def append(self, rows: Tensor, length: int) -> None:
        """Write ``[B, ..., m, width]`` after the ``length`` tokens there have been."""
        total = length + rows.shape[-2]
        self._make_room(length, total)
        first = max(length, total - self.capacity)
        done = first - length
        for low, count in self._spans(first, total):
            self._slots(low, count).copy_(rows.detach().narrow(-2, done, count))
            done += count

    def hold(self, rows: Tensor, length: int) -> None:
        """Take over ``rows`` ``[B, ..., n, width]``, the newest of ``length`` tokens, as far as the limit allows."""
        first = length - rows.shape[-2]
        if first and self.limit is not None:  # tokens are missing: it has wrapped, and cannot grow any more
            self.data = self._allocate(rows, self.limit)
        self.append(rows, first)
        self.oldest = max(self.oldest, first)

    def fits(self, rows: Tensor) -> bool:
        """Whether ``rows`` have this memory's batch, dtype and device."""
        return (rows.shape[0], rows.dtype, rows.device) == (self.batch_size, self.dtype, self.device)

    def tokens(self, start: int, stop: int) -> list[Tensor]:
        """Views of tokens ``start:stop``, oldest first: one, or two where the ring wraps.

        As memory lies, with heads beside batch rows: ``[B * ..., n, width]``, or ``[B * ..., width, n]``.
        """
        rows, capacity = self._rows, self.capacity
        low, count = start % capacity, stop - start
        if low + count <= capacity:
            return [rows.narrow(self._slots_dim, low, count)]
        return [rows.narrow(self._slots_dim, *span) for span in self._spans(start, stop)]

    def gathered(self, start: int, stop: int) -> Tensor:
        """A copy of tokens ``start:stop``, ``[B, ..., n, width]``."""
        return torch.cat([self._slots(*span) for span in self._spans(start, stop)], dim=-2)

    def shift(self, by: Tensor, most: int, length: int, stop: int) -> None:
        """Let each row's token ``t`` before ``stop`` be what its token ``t - by`` of ``length`` was; zeros if none.

        ``by`` is int64 ``[B]``, and at most ``most``.
        """
        first = self.oldest
        held = self.gathered(first, length)
        source = torch.arange(first, stop, device=held.device) - by[:, None]
        source = source.view(len(source), *[1] * (held.ndim - 3), -1, 1)
        index = (source - first).clamp_min(0).expand(*held.shape[:-2], -1, held.shape[-1])
        self.append(torch.where(source >= first, held.gather(-2, index), held.new_zeros(())), first)
        if first:
            self.oldest = first + most

    def _slots(self, low: int, count: int) -> Tensor:
        """View ``[B, ..., count, width]``, however memory lies."""
        part = self.data.narrow(self._slots_dim, low, count)
        return part.mT if self.slots_last else part

    def _spans(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """First slot and number of slots of each contiguous stretch."""
        capacity = self.capacity
        while start < stop:
            low = start % capacity
            count = min(capacity - low, stop - start)
            yield low, count
            start += count

    def _make_room(self, length: int, total: int) -> None:
        """For the tokens up to ``total``: more memory, or that of the oldest ones."""
        if total > self.capacity:
            self._grow(length, total)
            self.oldest = max(self.oldest, total - self.capacity)
        # what select or load made under inference_mode could not be written outside; compiled code cannot ask
        if not torch.compiler.is_compiling() and self._rows.is_inference() and not torch.is_inference_mode_enabled():
            self._rows = self._rows.clone()

    def _grow(self, length: int, needed: int) -> None:
        if self.limit is not None and self.capacity >= self.limit:
            return
        capacity = max(needed, 2 * self.capacity)
        old = self._slots(0, length)
        self.data = self._allocate(old, capacity if self.limit is None else min(capacity, self.limit))
        self._slots(0, length).copy_(old)

    def _allocate(self, like: Tensor, capacity: int) -> Tensor:
        *leading, _, width = like.shape
        with torch.inference_mode(False):  # else it could not be written outside of it
            return like.new_zeros(*leading, *((width, capacity) if self.slots_last else (capacity, width)))
