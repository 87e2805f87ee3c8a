"""What the backward has to make, and in which chunks of rows its scratch memory lets it."""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

import triton

from hypermlp_kernels.backward_tiles import BackwardTile
from hypermlp_kernels.call import Call, multiprocessors

# each part makes a tile more, and its sums are written and read again
PART_KEYS = 1024


class Split(NamedTuple):
    """When rows are taken in parts: where too few of ``programs`` side by side would be busy, of ``span`` key tiles."""

    span: int
    programs: int

    @classmethod
    def of(cls, tile: BackwardTile, span: int | None) -> Split:
        """The rule's, or parts of ``span`` tiles wherever rows are longer."""
        if span is not None:
            return cls(span, sys.maxsize)
        return cls(PART_KEYS // tile.keys, multiprocessors())

    def parts(self, longest: int, tiles: int) -> int:
        """Of the longest row block in a chunk of ``tiles``; 1 if it is at most one and a half times a program's share.

        Parts of half a share keep all programs busy, and every part costs a tile more: they are not made smaller.
        """
        if 2 * longest * self.programs <= 3 * tiles:
            return 1
        return int(triton.cdiv(longest, max(self.span, tiles // (2 * self.programs))))


class Chunk(NamedTuple):
    """Row blocks ``first:stop``, counted head after head for each block of rows; ``origin`` tiles come before them.

    They have ``tiles`` of their own. No block has more than ``parts`` parts, each of ``span`` key tiles at the most;
    1: rows are not split.
    """

    first: int
    stop: int
    origin: int
    tiles: int
    parts: int
    span: int

    @property
    def blocks(self) -> int:
        return self.stop - self.first


class Sizes(NamedTuple):
    """What a chunk's scratch memory takes, in bytes: for each tile, and for each part of a row block."""

    tile: int
    part: int

    def of_block(self, parts: int) -> int:
        """Beside its tiles."""
        return self.part * parts if parts > 1 else 0

    def of(self, chunk: Chunk) -> int:
        return self.tile * chunk.tiles + self.of_block(chunk.parts) * chunk.blocks


class Plan(NamedTuple):
    """How many tiles each row block has in the scratch, and which blocks fit at once (see ``backward_blocks``).

    ``heads`` are those of all batch rows, or of the one that packed sequences make.
    """

    num_blocks: int
    heads: int
    full: int
    most: int
    step: int

    @classmethod
    def of(cls, call: Call, tile: BackwardTile, num_blocks: int, heads: int) -> Plan:
        step = tile.rows // tile.keys
        most = triton.cdiv(call.sizes[1], tile.keys)
        if call.options.by_lag:
            most = min(most, step + triton.cdiv(call.max_lag - 1, tile.keys))
        return cls(num_blocks, heads, most // step if call.options.causal else 0, most, step)

    def tiles_before(self, block: int) -> int:
        """Tiles before a block, counted head after head."""
        block, head = divmod(block, self.heads)
        before = self._of_head(block)
        return before * self.heads + head * (self._of_head(block + 1) - before)

    def _of_head(self, blocks: int) -> int:
        growing = min(blocks, self.full)
        return growing * (growing + 1) // 2 * self.step + (blocks - growing) * self.most

    def chunks(self, limit: int, sizes: Sizes, split: Split) -> Iterator[Chunk]:
        """All blocks, in chunks of at most ``limit`` bytes, or of one block: the longest rows of all heads first.

        A program owns a block of rows or a part of one, so a chunk takes as long as its longest: long rows come
        with long ones.
        """
        stop = self.num_blocks * self.heads
        while stop > 0:
            end = self.tiles_before(stop)
            longest = end - self.tiles_before(stop - 1)
            first = self._first(stop, limit, sizes, parts=1)
            parts = split.parts(longest, end - self.tiles_before(first))
            if parts > 1:
                first = self._first(stop, limit, sizes, parts)
            origin = self.tiles_before(first)
            yield Chunk(first, stop, origin, end - origin, parts, triton.cdiv(longest, parts))
            stop = first

    def _first(self, stop: int, limit: int, sizes: Sizes, parts: int) -> int:
        """First of the blocks before ``stop`` that fit together, one at the least."""

        def bytes_before(block: int) -> int:
            return self.tiles_before(block) * sizes.tile + block * sizes.of_block(parts)

        return min(bisect_left(range(stop), bytes_before(stop) - limit, key=bytes_before), stop - 1)
