"""How a forward is made: the map again for every block of values, or stored once, in chunks of bounded size.

The choice is a model's, from instructions counted in compiled kernels (``make kernel-report``); nothing in it
was timed. ``kernels/README.md`` shows the counts.
"""

from __future__ import annotations

from typing import NamedTuple

from hypermlp_kernels.tiles import Precision, Tile

# the scratch is stored in blocks of so many columns, whatever the tiles
_COLUMNS = 16


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
        limit: bytes.
        grows: whether row ``i`` has no more than ``i + 1`` columns, the blocks being in order.

    Returns:
        An empty list if a slot is over the limit.
    """
    found, first, total = [], 0, num_blocks * per_block
    while first < total:
        longest = (num_blocks - first // per_block) * rows
        width = min(longest, columns) if grows else columns
        pitch = -(-width // _COLUMNS) * _COLUMNS
        slots = min(total - first, limit // (rows * pitch * element_size))
        if slots == 0:
            return []
        found.append(Chunk(first, slots, pitch))
        first += slots
    return found


class _Cost(NamedTuple):
    """Clocks of a Hopper SM to issue what is beside the products, for 128 x 128 scores of a head.

    ``map``: from keys to the activated map, with one score map and with two (GLU). ``select``: the same with
    the statistics. ``store``: into the scratch. ``weights``: from the activated map to weights by key, and
    ``channel`` more for each channel of values. ``rate``: FLOP of products a clock.
    """

    map: tuple[int, int]
    select: tuple[int, int]
    store: int
    weights: int
    channel: int
    rate: int


_COSTS: dict[Precision, _Cost] = {
    "bf16": _Cost((1230, 3980), (2010, 5110), 140, 2890, 3, 4096),
    "fp16": _Cost((2490, 6100), (3220, 6310), 240, 3420, 3, 4096),
    "tf32": _Cost((1260, 4650), (3490, 6640), 250, 3620, 3, 2048),
    # products are ordinary instructions there: 128 multiplications and additions a clock
    "ieee": _Cost((4900, 10620), (8220, 14780), 400, 5150, 33, 256),
}
_SCORES = 128 * 128
# 3 TB/s over 132 SMs at 1.7 GHz
_BYTES_PER_CLOCK = 13.4
# two more launches, and a GPU that empties and fills again: 10 microseconds
_CHUNK_CLOCKS = 17000


class Widths(NamedTuple):
    """What a score and its use cost."""

    precision: Precision
    glu: bool
    score_width: int
    value_width: int
    rank: int
    element_size: int  # of the stored map


class Tiles(NamedTuple):
    """The preferred tile of each kernel that the choice is about."""

    statistics: Tile
    readout: Tile
    stored_readout: Tile


def modelled_clocks(
    widths: Widths, tiles: Tiles, parts: list[Chunk], rows: int, multiprocessors: int
) -> tuple[float, float]:
    """Clocks of an SM for 128 x 128 scores of a head, ``z1`` aside: with the map made again, and stored.

    Issue, products and the scratch's traffic are added up, as if nothing overlapped. A kernel with fewer programs
    than ``multiprocessors`` takes as long as if it had one for each. The stored map is written and read once: the
    blocks of values of the same rows run side by side.
    """
    cost, maps = _COSTS[widths.precision], 2 if widths.glu else 1
    product = 2 * _SCORES / cost.rate
    scores = product * maps * (widths.score_width + widths.rank)
    select = cost.select[widths.glu] + scores + product * widths.rank

    def read(tile: Tile) -> tuple[float, int]:
        blocks = -(-widths.value_width // tile.values)
        block = cost.weights + cost.channel * tile.values + product * (widths.rank + tile.values)
        return block, blocks

    def spread(clocks: float, slots: int, tile: Tile, blocks: int = 1) -> float:
        programs = slots * (rows // tile.rows) * blocks
        return clocks * blocks * max(1.0, multiprocessors / programs)

    every = sum(part.slots for part in parts)
    block, blocks = read(tiles.readout)
    again = spread(select, every, tiles.statistics)
    again += spread(block + cost.map[widths.glu] + scores, every, tiles.readout, blocks)

    block, blocks = read(tiles.stored_readout)
    slots = parts[0].slots
    stored = spread(select + cost.store, slots, tiles.statistics) + spread(block, slots, tiles.stored_readout, blocks)
    stored += 2 * _SCORES * widths.element_size / _BYTES_PER_CLOCK
    per_multiprocessor = sum(part.slots * part.pitch for part in parts) * rows / _SCORES / multiprocessors
    return again, stored + (len(parts) - 1) * _CHUNK_CLOCKS / per_multiprocessor
