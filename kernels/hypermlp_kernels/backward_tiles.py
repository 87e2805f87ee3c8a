"""The static table of the backward's tiles, preferred ones first: its kernels share maps, and so they share a tile."""

from __future__ import annotations

from typing import NamedTuple

from hypermlp_kernels.tiles import Family, Precision, pad_width


class BackwardTile(NamedTuple):
    """``rows`` queries (BM) by ``keys`` (BN), and how to compile the kernels.

    The weights' gradient is made for ``columns`` keys at once, over ``depth`` channels at a time, and the
    values' gradient for ``values`` channels. All are powers of two from 16 on; ``rows`` is a multiple of
    ``keys``. Programs that own ``keys`` table rows have warps in proportion.
    """

    rows: int
    keys: int
    columns: int
    depth: int
    values: int
    warps: int
    stages: int


_FLOAT32 = BackwardTile(32, 32, 64, 32, 64, 4, 2)
_TILES: dict[Precision, tuple[BackwardTile, ...]] = {
    "bf16": (BackwardTile(64, 64, 128, 64, 128, 4, 2), BackwardTile(32, 32, 64, 64, 64, 4, 2)),
    "fp16": (BackwardTile(64, 32, 128, 64, 128, 4, 2), _FLOAT32),
    "tf32": (BackwardTile(64, 32, 128, 32, 128, 4, 2), _FLOAT32),
    "ieee": (BackwardTile(32, 32, 128, 32, 128, 8, 1),),
}
# taller blocks read the values and the rows' streams half as often
_HOPPER: dict[Precision, tuple[BackwardTile, ...]] = {"bf16": (BackwardTile(128, 64, 256, 64, 256, 8, 2),)}
_SMALLEST = BackwardTile(16, 16, 16, 16, 16, 2, 1)


def backward_tiles(precision: Precision, value_width: int, family: Family) -> tuple[BackwardTile, ...]:
    """Tiles to try, in order; a block of channels is no wider than the values are."""
    preferred = _HOPPER.get(precision, ()) if family == "hopper" else ()
    widest = pad_width(value_width)
    found = (*preferred, *_TILES[precision], _SMALLEST)
    return tuple(tile._replace(depth=min(tile.depth, widest), values=min(tile.values, widest)) for tile in found)
