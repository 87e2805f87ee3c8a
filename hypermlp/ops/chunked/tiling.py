"""What the chunked path's forward and backward share: slabs, tiles and one head's operands.

A *slab* is one head of a few batch rows that hold sequences of equal length; a *tile* is a block
of its query rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hypermlp.ops.arguments import OperatorArgs, SequenceMix
from hypermlp.ops.lag_layout import Layout, ScoreBuffer, Tile
from hypermlp.ops.varlen import segments
from hypermlp_kernels.arguments import Segment

# Elements of one tile's map: enough for tall products up to 8192 columns, which on a CPU core gain
# more than maps that stay in its second-level cache. An accelerator wants launches of some size.
_CPU_TILE_ELEMENTS = 1 << 20
_ACCELERATOR_TILE_ELEMENTS = 1 << 24
_MIN_ROWS, _MAX_ROWS = 32, 128


class Slab(NamedTuple):
    """One head over one segment's batch rows, and how many query rows a tile has.

    The first ``past`` tokens of the batch are keys alone: queries are the rows after them.
    """

    segment: Segment
    head: int
    rows: int
    past: int

    @property
    def batch(self) -> int:
        return self.segment.batch_stop - self.segment.batch_start

    @property
    def first(self) -> int:
        """The segment's first query row."""
        return max(0, self.past - self.segment.start)

    def keys(self, x: Tensor, head: int) -> Tensor:
        """The slab's part ``[batch, n, ...]`` of ``x`` ``[B, T, heads, ...]``, which has every token."""
        part = self.segment
        return x[part.batch_start : part.batch_stop, part.start : part.stop, head]

    def queries(self, x: Tensor, head: int) -> Tensor:
        """The slab's part of an ``x`` that has the query rows alone."""
        part = self.segment
        start = part.start + self.first - self.past
        return x[part.batch_start : part.batch_stop, start : part.stop - self.past, head]

    def valid(self, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """0/1 ``[batch, n]`` where tokens inside the sequence are masked, else None."""
        if mask is None or not self.segment.has_holes:
            return None
        part = self.segment
        return mask[part.batch_start : part.batch_stop, part.start : part.stop].to(dtype)


def slabs(x: OperatorArgs) -> Iterator[tuple[Layout, list[Slab]]]:
    """Every part of ``v``'s ``[B, T]`` there is to compute: per segment, its layout and its slabs."""
    batch, length, num_heads, _ = x.v.shape
    budget = _CPU_TILE_ELEMENTS if x.v.device.type == "cpu" else _ACCELERATOR_TILE_ELEMENTS
    for segment in segments(x.tokens, batch, length):
        if segment.stop <= x.past:
            continue
        layout = Layout.of(segment.stop - segment.start, x.options)
        rows = _tile_rows(layout, budget)
        at_once = max(1, budget // (rows * layout.columns))
        parts = [
            segment._replace(batch_start=start, batch_stop=min(start + at_once, segment.batch_stop))
            for start in range(segment.batch_start, segment.batch_stop, at_once)
        ]
        yield layout, [Slab(part, head, rows, x.past) for head in range(num_heads) for part in parts]


def _tile_rows(layout: Layout, budget: int) -> int:
    """Rows that fill the budget, but few enough that the diagonal's idle half stays small."""
    rows = min(budget // layout.columns, layout.length // 4) // 16 * 16
    return min(layout.length, max(_MIN_ROWS, min(rows, _MAX_ROWS)))


class Workspaces:
    """Score buffers for every tile size met, made once: fresh memory is slow."""

    def __init__(self, like: Tensor, num_buffers: int) -> None:
        self._like, self._num_buffers = like, num_buffers
        self._made: dict[tuple[Layout, int, int], list[ScoreBuffer]] = {}

    def tiles(self, layout: Layout, slab: Slab) -> Iterator[tuple[Tile, list[ScoreBuffer]]]:
        """The slab's tiles, each with its buffers."""
        for tile in layout.tiles(slab.rows, slab.first):
            key = (layout, slab.batch, tile.rows)
            if key not in self._made:
                self._made = {made: buffers for made, buffers in self._made.items() if made[0] == layout}
                self._made[key] = [ScoreBuffer(*key, self._like) for _ in range(self._num_buffers)]
            yield tile, self._made[key]


class Tables(NamedTuple):
    """A sequence mixing's tables in column order: ``[heads, n]`` and ``[heads, n, R]``, or one head's.

    ``scale`` is ``identity + diag``; None stands for the identity alone or, without it, for zero.
    """

    scale: Tensor | None
    down: Tensor | None
    up: Tensor | None
    identity: bool

    @classmethod
    def arrange(cls, mix: SequenceMix, layout: Layout, dtype: torch.dtype) -> Tables:
        tables = cls(mix.diag, mix.down, mix.up, mix.identity).map(lambda table: layout.arrange(table.to(dtype)))
        if tables.scale is not None and mix.identity:
            tables = tables._replace(scale=tables.scale + 1)
        return tables

    def map(self, pick: Callable[[Tensor], Tensor]) -> Tables:
        scale, down, up = (None if table is None else pick(table) for table in (self.scale, self.down, self.up))
        return Tables(scale, down, up, self.identity)


class Mixing(NamedTuple):
    """One head's sequence mixing over a slab: tables, core and statistic ``[batch, n, R]``."""

    layout: Layout
    tables: Tables
    core: Tensor | None
    z: Tensor

    @classmethod
    def of(cls, layout: Layout, slab: Slab, head: int, tables: Tables, core: Tensor | None, z: Tensor) -> Mixing:
        """``head``'s part of ``[heads, ...]`` tables and of ``[B, T, heads, R]`` core and statistic."""
        core = None if core is None else slab.queries(core, head)
        return cls(layout, tables.map(lambda table: table[head]), core, slab.queries(z, head))

    def beside(self, tile: Tile) -> Tables:
        return self.tables.map(lambda table: self.layout.beside(table, tile))

    def apply(self, x: Tensor, tile: Tile, out: Tensor, saved: bool) -> None:
        """``out = x * scale + (core * z) up^T`` with ``z = x down``, for ``x`` ``[batch * rows, columns]``.

        ``out`` may be ``x``. Keeps ``z``, or takes the ``saved`` one.
        """
        tables, z = self.beside(tile), self.z[:, tile.own]
        if tables.down is not None and not saved:
            z.copy_((x @ tables.down).view_as(z))
        if tables.scale is not None:
            torch.mul(x, tables.scale, out=out)
        elif not tables.identity:
            out.zero_()
        elif out is not x:
            out.copy_(x)
        if tables.up is not None:
            out.addmm_(self.times_core(z, tile), tables.up.mT)

    def times_core(self, z: Tensor, tile: Tile) -> Tensor:
        """``core * z`` of a tile, ``[batch * rows, R]``."""
        return (z if self.core is None else self.core[:, tile.own] * z).flatten(0, 1)
