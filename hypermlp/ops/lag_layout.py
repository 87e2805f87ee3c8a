"""Position and lag: the one home of every shift between them.

Scores are made by key position ``j`` and mixed by lag ``l = i - j``. In a buffer whose rows are
``pitch`` apart, the element of row ``r`` and column ``x`` lies at ``r * pitch + x``. Read with
rows ``pitch + 1`` apart it is column ``x - r``: one step to the left for every row, which is the
shift from position to lag. Both are views of one memory, so the shift moves no data
(``docs/mathematics.md`` draws it). Columns then run from the largest lag to lag 0, so tables are
reversed once per call. The position layout has the same interface and shifts nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hypermlp.ops.varlen import Tokens, sequence_origins
from hypermlp_kernels.arguments import Options


def columns_to_keys(start: Tensor, stop: Tensor, options: Options, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Which key each table row stands for, seen from each query (the dense path's index).

    Args:
        start: ``[T]`` first key of each query's span; ``stop`` one past its last.
        options: by ``layout``, row ``c`` is key ``i - c`` (``"lag"``) or ``origin + c`` (``"position"``); ``max_lag``
            rows of the tables, None for ``T``.
        tokens: who is there.

    Returns:
        ``keys``, int64 ``[B or 1, 1, T, n]`` within bounds, and ``visible``, bool, of the same
        shape: whether that key exists and may be seen.
    """
    length, device, valid = start.shape[0], start.device, tokens.valid
    columns = torch.arange(length, device=device)[: options.max_lag]  # min of a length and a number would be a constant
    if options.by_lag:
        keys = (torch.arange(length, device=device)[:, None] - columns)[None]
    else:
        batch = 1 if valid is None else valid.shape[0]
        keys = sequence_origins(tokens, batch, length, device)[:, :, None] + columns
    visible = (keys >= start[:, None]) & (keys < stop[:, None])
    keys = keys.clamp(0, length - 1)
    if valid is not None:
        visible = visible & valid[torch.arange(valid.shape[0], device=device)[:, None, None], keys]
    return keys[:, None], visible[:, None]


_ALIGNMENT = 16


class Tile(NamedTuple):
    """Query rows ``start:stop`` of a sequence, the keys they see together, and their columns.

    ``first`` is the sequence's first query row: earlier tokens, if any, are keys alone.
    """

    start: int
    stop: int
    key_start: int
    key_stop: int
    columns: int
    first: int

    @property
    def own(self) -> slice:
        """The tile's rows in a tensor that has the query rows alone."""
        return slice(self.start - self.first, self.stop - self.first)

    @property
    def keys(self) -> slice:
        """The tile's keys in a tensor that has every token."""
        return slice(self.key_start, self.key_stop)

    @property
    def rows(self) -> int:
        return self.stop - self.start


class Layout(NamedTuple):
    """How the columns of a map over ``length`` tokens stand for keys.

    Attributes:
        length: tokens in the sequence.
        columns: rows of the tables in use: the window in the lag layout, else ``length``.
        by_lag: columns are lags, largest first (causal); else positions.
        causal: whether keys after the query are hidden.
    """

    length: int
    columns: int
    by_lag: bool
    causal: bool

    @classmethod
    def of(cls, length: int, options: Options) -> Layout:
        """Of one sequence."""
        return cls(length, min(length, options.window or length), options.by_lag, options.causal)

    def tiles(self, rows: int, first: int = 0) -> Iterator[Tile]:
        """Query rows from ``first`` on, ``rows`` at a time."""
        for start in range(first, self.length, rows):
            stop = min(start + rows, self.length)
            key_start = max(0, start - self.columns + 1) if self.by_lag else 0
            key_stop = stop if self.causal else self.length
            yield Tile(start, stop, key_start, key_stop, min(key_stop, self.columns), first)

    def arrange(self, table: Tensor) -> Tensor:
        """The used rows of a table ``[heads, L, ...]``, in column order."""
        if not self.by_lag:
            return table[:, : self.columns]
        # a gather of whole rows takes a third of the time of flip
        return table.index_select(1, torch.arange(self.columns - 1, -1, -1, device=table.device))

    def restore(self, table: Tensor, max_lag: int) -> Tensor:
        """Inverse of :meth:`arrange`, for gradients: unused rows are zero."""
        table = table.flip(1) if self.by_lag else table
        return F.pad(table, (0, 0) * (table.ndim - 2) + (0, max_lag - self.columns))

    def beside(self, table: Tensor, tile: Tile) -> Tensor:
        """Rows of one head's arranged table that stand beside the tile's columns."""
        return table[self.columns - tile.columns :] if self.by_lag else table[: tile.columns]


class ScoreBuffer:
    """A map of one tile for ``batch`` sequences, read by key position and by table column.

    Each view has elements the other does not write: :meth:`hide` them before reading.
    """

    def __init__(self, layout: Layout, batch: int, rows: int, like: Tensor) -> None:
        self._layout, self._batch, self._rows = layout, batch, rows
        # rows of the view by column start on a cache line: it is read and written most
        width = layout.columns + (rows if layout.by_lag else 0)
        self._row_stride = -(-width // _ALIGNMENT) * _ALIGNMENT
        self._shift = 1 if layout.by_lag else 0
        self._storage = like.new_empty(batch * rows * self._row_stride)

    def by_key(self, tile: Tile) -> Tensor:
        """``[batch, rows, keys]``: columns are the tile's keys in order."""
        return self._keys(tile, tile.key_start, tile.key_stop)

    def by_column(self, tile: Tile) -> Tensor:
        """``[batch * rows, columns]``: columns are table rows, in the order of ``arrange``."""
        offset = self._layout.columns - tile.columns if self._layout.by_lag else 0
        return self._storage.as_strided((self._batch * self._rows, tile.columns), (self._row_stride, 1), offset)

    def hide(self, tile: Tile, valid: Tensor | None = None) -> None:
        """Zero every element that is no visible key, whatever it held (NaN included).

        ``valid`` is 0/1 ``[batch, n]`` where tokens are masked inside the sequence.
        """
        layout, keys = self._layout, self.by_key(tile)
        if layout.causal:
            keys[..., tile.start - tile.key_start :].tril_()
        if layout.by_lag:
            before_window = tile.key_start - (tile.start - layout.columns + 1)
            if before_window < tile.rows - 1:
                keys[..., : tile.rows - 1 - before_window].triu_(-before_window)
            before_first = min(before_window, tile.rows - 1)
            if before_first > 0:
                self._keys(tile, -before_first, 0).zero_()
        if valid is not None:
            keys.mul_(valid[:, None, tile.key_start : tile.key_stop])

    def _keys(self, tile: Tile, start: int, stop: int) -> Tensor:
        strides = (self._rows * self._row_stride, self._row_stride - self._shift, 1)
        offset = self._shift * (self._layout.columns - 1 - tile.start) + start
        return self._storage.as_strided((self._batch, self._rows, stop - start), strides, offset)
