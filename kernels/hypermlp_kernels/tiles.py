"""The static table of tiles: by architecture, precision and widths, from the preferred one to the smallest.

A launch takes the first tile that the device has shared memory for. ``make kernel-report`` compiles all
of them and shows their resources; ``kernels/README.md`` says how they were chosen.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Kernel = Literal["routing_statistic", "selection_statistics", "readout"]
Precision = Literal["half", "tf32", "ieee"]


class Tile(NamedTuple):
    """``rows`` queries (BM) by ``keys`` (BN), ``values`` channels (BV, readout alone), and how to compile them.

    ``rows`` is a multiple of ``keys``, and all sizes are powers of two of at least 16.
    """

    rows: int
    keys: int
    values: int
    warps: int
    stages: int


def pad_width(width: int) -> int:
    """The smallest power of two a dot can take that holds ``width``."""
    return max(16, 1 << (width - 1).bit_length())


# float32 without tensor cores computes dots from registers: tiles stay small
_STATISTICS: dict[Precision, tuple[Tile, ...]] = {
    "half": (Tile(64, 64, 0, 4, 2), Tile(64, 32, 0, 4, 2), Tile(32, 32, 0, 4, 2), Tile(16, 16, 0, 2, 1)),
    "tf32": (Tile(64, 32, 0, 4, 2), Tile(32, 32, 0, 4, 2), Tile(32, 16, 0, 4, 1), Tile(16, 16, 0, 2, 1)),
    "ieee": (Tile(32, 32, 0, 4, 1), Tile(16, 16, 0, 2, 1)),
}
_READOUT: dict[Precision, tuple[Tile, ...]] = {
    "half": (
        Tile(128, 32, 128, 8, 2),
        Tile(64, 32, 128, 4, 2),
        Tile(64, 32, 64, 4, 1),
        Tile(32, 32, 32, 4, 1),
        Tile(16, 16, 16, 2, 1),
    ),
    "tf32": (Tile(64, 32, 64, 4, 2), Tile(32, 32, 32, 4, 1), Tile(16, 16, 16, 2, 1)),
    "ieee": (Tile(32, 32, 32, 4, 1), Tile(16, 16, 16, 2, 1)),
}


def tiles(kernel: Kernel, precision: Precision, value_width: int) -> tuple[Tile, ...]:
    """Tiles to try, in order; a value block is no wider than the values are."""
    if kernel != "readout":
        return _STATISTICS[precision]
    widest = pad_width(value_width)
    found = [tile._replace(values=min(tile.values, widest)) for tile in _READOUT[precision]]
    return tuple(dict.fromkeys(found))
