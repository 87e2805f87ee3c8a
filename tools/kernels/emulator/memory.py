"""Global and shared memory, and what goes wrong in them."""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
_GAP = 4096
_ALIGNMENT = 256
_BANKS = 32
NOBODY, EVERYBODY = -1, -2


class FaultError(RuntimeError):
    """An access that ends a kernel on a GPU: outside of what was allocated, or misaligned."""


class Memory:
    """Bytes with checked access."""

    def __init__(self, size: int) -> None:
        self.data = np.zeros(size, np.uint8)
        self.allowed = np.zeros(size, bool)

    def check(self, addresses: Ints, nbytes: int, what: str) -> None:
        if not addresses.size:
            return
        if (addresses % nbytes).any():
            raise FaultError(f"misaligned address in {what}")
        last = addresses + nbytes - 1
        outside = (addresses < 0) | (last >= self.data.size)
        if outside.any() or not (self.allowed[addresses].all() and self.allowed[last].all()):
            raise FaultError(f"address outside of any allocation in {what}")

    def read(self, addresses: Ints, nbytes: int) -> NDArray[np.uint8]:
        """``[len(addresses), nbytes]``."""
        return self.data[addresses[:, None] + np.arange(nbytes)]

    def write(self, addresses: Ints, values: NDArray[np.uint8]) -> None:
        self.data[addresses[:, None] + np.arange(values.shape[1])] = values


class GlobalMemory(Memory):
    """Allocations with gaps between them that nobody may touch."""

    def __init__(self) -> None:
        super().__init__(_GAP)

    def allocate(self, content: NDArray[np.uint8]) -> int:
        """Its address."""
        start = -(-self.data.size // _ALIGNMENT) * _ALIGNMENT
        grown = start + content.size + _GAP - self.data.size
        self.data = np.concatenate([self.data, np.zeros(grown, np.uint8)])
        self.allowed = np.concatenate([self.allowed, np.zeros(grown, bool)])
        self.data[start : start + content.size] = content
        self.allowed[start : start + content.size] = True
        return start


class SharedMemory(Memory):
    """One block's, with a record for every word of who touched it since the last barrier."""

    def __init__(self, size: int, found: Counter[str]) -> None:
        super().__init__(size + 16)
        self.allowed[:] = True
        self.found = found
        words = self.data.size // 4 + 1
        self._epoch, self._stores = 0, 0
        self._written, self._writer = np.full(words, -1), np.full(words, NOBODY)
        self._read, self._reader = np.full(words, -1), np.full(words, NOBODY)
        self._not_fenced = np.zeros(words, bool)
        # the group of wgmmas that may still be reading a word
        self._group_reading = np.full(words, -1)
        self._groups, self._groups_done = 0, 0

    def barrier(self) -> None:
        self._epoch += 1

    def fence(self) -> None:
        """Make stores visible to wgmma."""
        self._not_fenced[:] = False

    def store(self, addresses: Ints, values: NDArray[np.uint8], warps: Ints) -> None:
        """Write, by a plain store.

        Several threads may store in one place, as those do that hold copies. Where the copies differ, one
        wins: a race between warps; inside a warp it may be a sum that was rounded in another order.
        """
        self.note_store(addresses, values.shape[1], warps)
        self.write(addresses, values)
        lost = (self.read(addresses, values.shape[1]) != values).any(1)
        others = self._writer[addresses // 4] != warps
        self.found["races"] += int((lost & others).sum())
        self.found["copies that differ in a warp"] += int((lost & ~others).sum())

    def note_store(self, addresses: Ints, nbytes: int, warps: Ints, *, fenced: bool = False) -> None:
        """Warps write; ``fenced``: in a way that needs no fence before a wgmma."""
        words, who = _words(addresses, nbytes, warps)
        others_wrote = (self._written[words] == self._epoch) & (self._writer[words] != who)
        others_read = (self._read[words] == self._epoch) & (self._reader[words] != who)
        self._written[words], self._writer[words] = self._epoch, who
        self.found["races"] += int((others_wrote | others_read).sum())
        self.found["operands overwritten in flight"] += int((self._group_reading[words] > self._groups_done).sum())
        self._not_fenced[words] |= not fenced

    def note_load(self, addresses: Ints, nbytes: int, warps: Ints) -> None:
        words, who = _words(addresses, nbytes, warps)
        raced = (self._written[words] == self._epoch) & (self._writer[words] != who)
        self.found["races"] += int(raced.sum())
        several = (self._read[words] == self._epoch) & (self._reader[words] != who)
        self._read[words], self._reader[words] = self._epoch, np.where(several, EVERYBODY, who)
        self._reader[words[self._reader[words] != who]] = EVERYBODY

    def note_operand(self, addresses: Ints) -> None:
        """A wgmma reads, for all four warps of its group."""
        words = np.unique(addresses // 4)
        self.found["races"] += int((self._written[words] == self._epoch).sum())
        self.found["stores not fenced before wgmma"] += int(self._not_fenced[words].sum())
        self._read[words], self._reader[words] = self._epoch, EVERYBODY
        self._group_reading[words] = self._groups + 1

    def commit_group(self) -> None:
        self._groups += 1

    def wait_group(self, pending: int) -> None:
        self._groups_done = max(self._groups_done, self._groups - pending)

    def count_wavefronts(self, kind: str, addresses: Ints, nbytes: int, mask: NDArray[np.bool_]) -> None:
        """Passes that a load or store takes: 32 banks of a word each, different words of a bank one after another."""
        words = max(1, nbytes // 4)
        lanes = _BANKS // words
        for start in range(0, addresses.size, lanes):
            part = addresses[start : start + lanes][mask[start : start + lanes]]
            if not part.size:
                continue
            touched = np.unique((part[:, None] // 4 + np.arange(words)).ravel())
            passes = int(np.bincount(touched % _BANKS).max())
            self.found[f"{kind} passes"] += passes
            self.found[f"{kind} conflicts"] += passes - -(-touched.size // _BANKS)


def _words(addresses: Ints, nbytes: int, warps: Ints) -> tuple[Ints, Ints]:
    count = max(1, nbytes // 4)
    words = (addresses[:, None] // 4 + np.arange(count)).ravel()
    return words, np.repeat(warps, count)
