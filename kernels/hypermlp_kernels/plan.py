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


class Cost(NamedTuple):
    """Clocks of a Hopper SM to issue what is beside the products, for 128 x 128 scores of a head.

    ``map``: from keys to the activated map, with one score map and with two (GLU). ``select``: the same with
    the statistics. ``store``: into the scratch. ``weights``: from the activated map to weights by key, and
    ``channel`` more for each channel of values. ``rate``: FLOP of products a clock.
    """

    map: tuple[int, int]
    select: tuple[int, int]
    store: int
    weights: int
    channel: float
    rate: int


# as tools/kernels/model_forward.py counts them, of the preferred tiles
COSTS: dict[Precision, Cost] = {
    "bf16": Cost((1840, 4216), (1468, 3480), 140, 1840, 0.2, 4096),
    "fp16": Cost((3248, 6440), (2688, 4928), 200, 1760, 1.1, 4096),
    "tf32": Cost((2264, 5064), (2912, 5480), 224, 2080, 1.2, 2048),
    # products are ordinary instructions there: 128 multiplications and additions a clock
    "ieee": Cost((5536, 10912), (7968, 13312), 448, 5088, 6.0, 256),
}
SCORES = 128 * 128
# 3 TB/s over 132 SMs at 1.7 GHz
BYTES_PER_CLOCK = 13.4
# of the clocks without it a scratch must save so many: a model's smaller gain is not worth the memory
_LEAST_GAIN = 0.05
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


class Clocks(NamedTuple):
    """Of an SM for 128 x 128 scores of a head: to issue instructions, and of tensor cores."""

    issue: float
    products: float


def map_products(widths: Widths, tile: Tile) -> float:
    """Tensor cores' clocks for the scores of a head's maps, and for one low-rank product beside each."""
    width = widths.score_width + low_rank_width(widths, tile)
    return product_clocks(width, widths) * (2 if widths.glu else 1)


def low_rank_width(widths: Widths, tile: Tile) -> int:
    """Low-rank products take the lag windows of a tile's groups of rows side by side."""
    return tile.rows // tile.keys * widths.rank


def product_clocks(width: int, widths: Widths) -> float:
    """Tensor cores' clocks for ``width`` multiplications and additions of every score."""
    return 2 * SCORES * width / COSTS[widths.precision].rate


def statistics_clocks(widths: Widths, tile: Tile, storing: bool) -> Clocks:
    """Of the pass for ``rho`` and ``z2``."""
    cost = COSTS[widths.precision]
    products = map_products(widths, tile) + product_clocks(low_rank_width(widths, tile), widths)
    return Clocks(cost.select[widths.glu] + cost.store * storing, products)


def readout_clocks(widths: Widths, tile: Tile, stored: bool) -> Clocks:
    """Of the readout of one block of values, from the stored map or with the map made again."""
    cost = COSTS[widths.precision]
    issue = cost.weights + cost.channel * tile.values
    products = product_clocks(tile.values + low_rank_width(widths, tile), widths)
    if stored:
        return Clocks(issue, products)
    return Clocks(issue + cost.map[widths.glu], products + map_products(widths, tile))


def modelled_clocks(
    widths: Widths, tiles: Tiles, parts: list[Chunk], rows: int, multiprocessors: int
) -> tuple[float, float]:
    """Clocks of an SM for 128 x 128 scores of a head, ``z1`` aside: with the map made again, and stored.

    Issue, products and the scratch's traffic are added up, as if nothing overlapped. A kernel with fewer programs
    than ``multiprocessors`` takes as long as if it had one for each. The stored map is written and read once: the
    blocks of values of the same rows run side by side.
    """

    def spread(clocks: Clocks, slots: int, tile: Tile, blocks: int = 1) -> float:
        programs = slots * (rows // tile.rows) * blocks
        return sum(clocks) * blocks * max(1.0, multiprocessors / programs)

    def both(slots: int, reading: Tile, stored: bool) -> float:
        select = spread(statistics_clocks(widths, tiles.statistics, stored), slots, tiles.statistics)
        blocks = -(-widths.value_width // reading.values)
        return select + spread(readout_clocks(widths, reading, stored), slots, reading, blocks)

    again = both(sum(part.slots for part in parts), tiles.readout, stored=False)
    stored = both(parts[0].slots, tiles.stored_readout, stored=True)
    stored += 2 * SCORES * widths.element_size / BYTES_PER_CLOCK
    per_multiprocessor = sum(part.slots * part.pitch for part in parts) * rows / SCORES / multiprocessors
    return again, stored + (len(parts) - 1) * _CHUNK_CLOCKS / per_multiprocessor


def stores(again: float, stored: float) -> bool:
    """Whether a call stores the map, by what :func:`modelled_clocks` found."""
    return stored < (1 - _LEAST_GAIN) * again
