"""How a forward is made: the map again in the readout, or stored in chunks of bounded size."""

from __future__ import annotations

from typing import NamedTuple

from hypermlp_kernels.tiles import Tile

# slots end at a whole number of the widest tile's columns
_COLUMNS = 64


class Chunk(NamedTuple):
    """Slots ``first .. first + slots`` of a call, each ``pitch`` columns wide."""

    first: int
    slots: int
    pitch: int


def slot_rows(*candidates: tuple[Tile, ...]) -> int:
    """Rows of a slot: a multiple of every tile's."""
    return max(tile.rows for tiles in candidates for tile in tiles)


def chunks(
    num_blocks: int, per_block: int, rows: int, columns: int, element_size: int, limit: int, *, grows: bool
) -> list[Chunk]:
    """Chunks of a scratch of at most ``limit`` bytes: the longest rows first, all heads of a block together.

    Args:
        num_blocks: blocks of ``rows`` rows.
        per_block: slots to a block, one for each head (and batch row).
        rows: rows of a slot.
        columns: of the longest row: lags, or keys by position.
        element_size: bytes.
        limit: bytes; a chunk holds one slot at least.
        grows: whether a row ``i`` has no more than ``i + 1`` columns, the blocks being in order.
    """
    found, first, total = [], 0, num_blocks * per_block
    while first < total:
        longest = (num_blocks - first // per_block) * rows
        width = min(longest, columns) if grows else columns
        pitch = -(-width // _COLUMNS) * _COLUMNS
        slots = min(total - first, max(1, limit // (rows * pitch * element_size)))
        found.append(Chunk(first, slots, pitch))
        first += slots
    return found
