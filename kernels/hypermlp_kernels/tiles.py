"""The static table of tiles: by kernel, architecture, precision and value width, preferred ones first.

A launch takes the first tile that the device has shared memory for. ``make kernel-report`` compiles
all of them and shows their resources; ``kernels/README.md`` says how they were chosen.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

Design = Literal["recompute", "store"]
Kernel = Literal["routing_statistic", "selection_statistics", "readout", "stored_readout"]
Family = Literal["hopper", "ampere"]
Precision = Literal["bf16", "fp16", "tf32", "ieee"]

KERNELS: tuple[Kernel, ...] = get_args(Kernel)


class Tile(NamedTuple):
    """``rows`` queries (BM) by ``keys`` (BN), ``values`` channels (BV, readout alone), and how to compile them.

    ``rows`` is a multiple of ``keys``, and all sizes are powers of two of at least 16.
    """

    rows: int
    keys: int
    values: int
    warps: int
    stages: int


def check_tile(tile: Tile) -> None:
    """Raise a ``ValueError`` for a tile no kernel can take."""
    sizes = (*tile[:2], *((tile.values,) if tile.values else ()))
    counts = (tile.warps, tile.stages)
    if not all(isinstance(size, int) and size >= 16 and size & (size - 1) == 0 for size in sizes):
        raise ValueError(f"{tile}: sizes must be powers of two of at least 16")
    if tile.rows % tile.keys:
        raise ValueError(f"{tile}: rows must be a multiple of keys")
    if not all(isinstance(count, int) and count >= 1 for count in counts) or tile.warps & (tile.warps - 1):
        raise ValueError(f"{tile}: warps must be a power of two and stages at least 1")


def pad_width(width: int) -> int:
    """The smallest power of two a dot can take that holds ``width``."""
    return max(16, 1 << (width - 1).bit_length())


_TF32_STATISTICS = (Tile(64, 32, 0, 4, 2), Tile(32, 32, 0, 4, 2), Tile(32, 16, 0, 4, 1), Tile(16, 16, 0, 2, 1))
_STATISTICS: dict[Precision, tuple[Tile, ...]] = {
    "bf16": (Tile(64, 64, 0, 4, 2), Tile(64, 32, 0, 4, 2), Tile(32, 32, 0, 4, 2), Tile(16, 16, 0, 2, 1)),
    "fp16": _TF32_STATISTICS,
    "tf32": _TF32_STATISTICS,
    # without tensor cores dots are made from registers: tiles stay small
    "ieee": (Tile(32, 32, 0, 8, 1), Tile(16, 16, 0, 2, 1)),
}
# A block of values makes the whole map again, so it is as wide as registers allow: at 256 channels a few
# loop-invariant ones spill, which costs far less than making the map twice.
_READOUT: dict[Precision, tuple[Tile, ...]] = {
    "bf16": (Tile(64, 32, 256, 4, 2), Tile(64, 32, 64, 4, 2), Tile(64, 32, 64, 4, 1), Tile(32, 32, 32, 4, 1)),
    "fp16": (Tile(64, 32, 256, 4, 2), Tile(64, 32, 64, 4, 2), Tile(32, 32, 32, 4, 1)),
    "tf32": (Tile(64, 32, 64, 4, 2), Tile(32, 32, 32, 4, 1)),
    "ieee": (Tile(32, 32, 32, 8, 1),),
}
# asynchronous dots of warp groups keep their operands out of registers
_HOPPER_READOUT: dict[Precision, tuple[Tile, ...]] = {"bf16": (Tile(128, 32, 256, 8, 2), Tile(64, 32, 128, 4, 2))}
# The stored map costs a block of values a load, not a product of scores: tiles have room for more rows.
_STORED_READOUT: dict[Precision, tuple[Tile, ...]] = {
    "bf16": (Tile(64, 64, 256, 8, 2), Tile(64, 32, 128, 4, 3), Tile(32, 32, 32, 4, 1)),
    "fp16": (Tile(64, 64, 256, 8, 2), Tile(64, 32, 128, 4, 2), Tile(32, 32, 32, 4, 1)),
    "tf32": (Tile(64, 32, 128, 4, 2), Tile(32, 32, 32, 4, 1)),
    "ieee": (Tile(32, 32, 128, 8, 1), Tile(32, 32, 32, 8, 1)),
}
_HOPPER_STORED_READOUT: dict[Precision, tuple[Tile, ...]] = {
    "bf16": (Tile(128, 32, 256, 8, 3),),
    "fp16": (Tile(128, 32, 256, 8, 3),),
    "tf32": (Tile(128, 32, 128, 8, 2),),
}
_SMALLEST_READOUT = Tile(16, 16, 16, 2, 1)


def family_of(backend: str, arch: int | str) -> Family:
    """Whose tiles an architecture takes: asynchronous dots of warp groups, or dots of single warps."""
    return "hopper" if backend == "cuda" and isinstance(arch, int) and arch // 10 in (9, 10) else "ampere"


def tiles(kernel: Kernel, precision: Precision, value_width: int, family: Family) -> tuple[Tile, ...]:
    """Tiles to try, in order; a value block is no wider than the values are."""
    if kernel in ("routing_statistic", "selection_statistics"):
        return _STATISTICS[precision]
    any_family, hopper = _READOUT, _HOPPER_READOUT
    if kernel == "stored_readout":
        any_family, hopper = _STORED_READOUT, _HOPPER_STORED_READOUT
    preferred = hopper.get(precision, ()) if family == "hopper" else ()
    widest = pad_width(value_width)
    found = (*preferred, *any_family[precision], _SMALLEST_READOUT)
    return tuple(dict.fromkeys(tile._replace(values=min(tile.values, widest)) for tile in found))
