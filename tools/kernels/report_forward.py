"""Compile every kernel and tile ahead of time and print what each takes. ``make kernel-report`` runs this."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import chain
from typing import Any

import report_decode
import report_short_conv
import torch
import triton
from report_table import JUDGED, Row, arguments, complaints_of, print_plain_table, print_table, verdict
from virtual_gpu import TARGETS, Resources, resources, virtual_gpu

from hypermlp_kernels import launch
from hypermlp_kernels.arguments import Options, SequenceMix
from hypermlp_kernels.tiles import Design, Kernel, Tile, family_of, tiles

# what a launch is compiled for: the paper's widths at D = 1024 with two heads, and the other paths
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "glu bf16": {},
    "relu bf16": {"glu": False},
    "glu fp16": {"dtype": torch.float16},
    "glu tf32": {"dtype": torch.float32, "allow_tf32": True},
    "glu fp32": {"dtype": torch.float32},
    "position bf16": {"by_lag": False},
}
DESIGNS: dict[Design, tuple[Kernel, ...]] = {
    "recompute": ("routing_statistic", "selection_statistics", "readout"),
    "store": ("routing_statistic", "selection_statistics", "stored_readout"),
}
VALUES = 512


def switches(glu: bool, by_lag: bool) -> Options:
    return Options("glu" if glu else "relu", True, 1e-12, True, "lag" if by_lag else "position", 64)


def call(
    length: int = 64, *, glu: bool = True, by_lag: bool = True, dtype: torch.dtype = torch.bfloat16, heads: int = 2,
    width: int = 64, values: int = VALUES, rank: int = 16, allow_tf32: bool = False,
    chosen: dict[Kernel, Tile] | None = None, design: Design | None = "recompute", **options: Any,
) -> None:  # fmt: skip
    """One forward on zeros."""
    maps = 2 * heads if glu else heads

    def mix(count: int) -> SequenceMix:
        table = torch.zeros(count, 64, rank)
        return SequenceMix(torch.zeros(count, 64), table, table, torch.zeros(1, length, count, rank, dtype=dtype), True)

    q, v = torch.zeros(1, length, maps, width, dtype=dtype), torch.zeros(1, length, heads, values, dtype=dtype)
    launch.forward(
        q, q, v, mix(maps), mix(heads), switches(glu, by_lag), allow_tf32=allow_tf32, chosen=chosen, design=design,
        **options,
    )  # fmt: skip


def tile_table(arch: str, name: str, design: Design) -> dict[Kernel, tuple[Tile, ...]]:
    """Every tile of each kernel that a configuration launches."""
    options = CONFIGURATIONS[name]
    precision = launch.precision_of(options.get("dtype", torch.bfloat16), options.get("allow_tf32", False))
    family = family_of(TARGETS[arch].backend, TARGETS[arch].arch)
    return {kernel: tiles(kernel, precision, VALUES, family) for kernel in DESIGNS[design]}


def report(
    arch: str, name: str, preferred_only: bool = False, design: Design = "recompute"
) -> Iterator[tuple[Tile, Resources]]:
    """Resources of a design's kernels, each with every tile of its own (NVIDIA). ``z1`` is the same in both designs."""
    table = tile_table(arch, name, design)
    for choice in range(1 if preferred_only else max(len(found) for found in table.values())):
        chosen = {kernel: found[min(choice, len(found) - 1)] for kernel, found in table.items()}
        with virtual_gpu(arch) as gpu:
            try:
                call(**CONFIGURATIONS[name], chosen=chosen, design=design)
            except triton.OutOfResources as refused:
                if arch in JUDGED:
                    raise
                # the last kernel, compiled like the others, does not fit: a launch takes the next tile
                print(f"{arch} {name} {list(table)[-1]} {shape(chosen[list(table)[-1]])}: {refused}", file=sys.stderr)
            # of the kernel for norms of any size nearly every program only reads
            found = [one for one in gpu.compiled() if one.metadata.name != "extreme_norms_kernel"]
            for kernel, compiled in zip(table, found, strict=True):
                if choice >= len(table[kernel]) or (design == "store" and kernel == "routing_statistic"):
                    continue
                used = resources(compiled)
                if design == "store" and kernel == "selection_statistics":
                    used = used._replace(name=f"storing_{used.name}")
                yield chosen[kernel], used


def shape(tile: Tile) -> str:
    return "x".join(str(size) for size in tile[:3] if size)


def clocks_of_block(tile: Tile, used: Resources) -> float:
    """Modelled clocks of one SM to issue the loop's usual trips for 128 x 128 scores of a head: four a clock.

    Of one block of values.
    """
    return used.within * tile.warps / 4 * 128 * 128 / (tile.rows * tile.keys)


def issue_clocks(tile: Tile, used: Resources) -> int:
    """Of all values."""
    return round(clocks_of_block(tile, used) * (VALUES / tile.values if tile.values else 1))


def complaints(arch: str, name: str, tile: Tile, used: Resources) -> list[str]:
    """What is wrong with a compiled kernel: spills beyond the allowance, no tensor cores in its loop."""
    return complaints_of(arch, name, used.name.removesuffix("_kernel"), shape(tile), used)


def rows(arch: str, name: str, preferred_only: bool) -> Iterator[Row]:
    for tile, used in chain.from_iterable(report(arch, name, preferred_only, design) for design in DESIGNS):
        found, clocks = complaints(arch, name, tile, used), issue_clocks(tile, used)
        yield Row(used.name.removesuffix("_kernel"), shape(tile), tile.warps, used, clocks, found)


def main() -> int:
    options = arguments(__doc__, CONFIGURATIONS)
    found = print_table(options, rows)
    for other in () if options.brief else (report_decode, report_short_conv):
        print()
        found += print_plain_table(options.arch, other.CONFIGURATIONS, other.report)
    return verdict(found)


if __name__ == "__main__":
    sys.exit(main())
