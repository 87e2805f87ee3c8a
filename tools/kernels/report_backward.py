"""The backward's kernels compiled ahead of time, as the forward's are. Part of ``make kernel-report``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from report_forward import CONFIGURATIONS, VALUES, switches
from report_table import Row, arguments, complaints_of, print_table, verdict
from virtual_gpu import TARGETS, Resources, resources, virtual_gpu

from hypermlp_kernels import launch, launch_backward
from hypermlp_kernels.arguments import Needs, SequenceMix
from hypermlp_kernels.backward_pass import ADDING
from hypermlp_kernels.backward_tiles import BackwardTile, backward_tiles
from hypermlp_kernels.tiles import family_of

# in the order of virtual_gpu.KERNELS; some kernels are launched for two purposes, some on whole rows and on parts
LAUNCHES = (
    "weight_gradient",
    "readout_statistic_gradient",
    "readout_statistic_gradient in parts",
    "map_gradient",
    "map_gradient in parts",
    "table_gradient of readout",
    "table_gradient of routing",
    "turn of weights",
    "turn of scores",
    "turn of weights in parts",
    "turn of scores in parts",
    "key_product of values",
    "key_product of keys",
    "add_parts of statistics",
    "add_parts of queries",
)


def call(
    length: int = 64, *, glu: bool = True, by_lag: bool = True, dtype: torch.dtype = torch.bfloat16, heads: int = 2,
    width: int = 64, values: int = VALUES, rank: int = 16, tile: BackwardTile | None = None, **options: Any,
) -> None:  # fmt: skip
    """One backward on zeros, of every gradient."""
    maps = 2 * heads if glu else heads

    def mix(count: int) -> SequenceMix:
        table = torch.zeros(count, 64, rank)
        return SequenceMix(torch.zeros(count, 64), table, table, torch.zeros(1, length, count, rank, dtype=dtype), True)

    q, v = torch.zeros(1, length, maps, width, dtype=dtype), torch.zeros(1, length, heads, values, dtype=dtype)
    z1, rho, z2 = (torch.zeros(1, length, *shape) for shape in ((maps, rank), (heads,), (heads, rank)))
    launch_backward.backward(
        v.float(), v.float(), (z1, rho, z2), q, q, v, mix(maps), mix(heads),
        Needs.of([True] * 11), switches(glu, by_lag), **options, tile=tile,
    )  # fmt: skip


def tiles_of(arch: str, name: str) -> tuple[BackwardTile, ...]:
    """Every tile that a configuration may take."""
    options = CONFIGURATIONS[name]
    precision = launch.precision_of(options.get("dtype", torch.bfloat16), options.get("allow_tf32", False))
    return backward_tiles(precision, VALUES, family_of(TARGETS[arch].backend, TARGETS[arch].arch))


def report(arch: str, name: str, preferred_only: bool = False) -> Iterator[tuple[BackwardTile, Resources]]:
    """Resources of a configuration's :data:`LAUNCHES`, under their names, with every tile (NVIDIA)."""
    found = tiles_of(arch, name)
    for tile in found[:1] if preferred_only else found:
        with virtual_gpu(arch) as gpu:
            call(**CONFIGURATIONS[name], tile=tile)
            call(2 * tile.rows, **CONFIGURATIONS[name], tile=tile, span=1)
            for launched, compiled in zip(LAUNCHES, gpu.compiled(), strict=True):
                yield tile, resources(compiled)._replace(name=launched)


def issue_clocks(tile: BackwardTile, used: Resources, by_lag: bool) -> int:
    """Modelled clocks of one SM to issue the loop's usual trips for 128 x 128 scores of a map: four a clock.

    Of all its values.
    """
    elements, warps = tile.rows * tile.keys, tile.warps
    if used.name == "weight_gradient":
        elements = tile.rows * tile.columns * tile.depth // VALUES
    elif used.name.startswith("key_product"):
        elements = tile.rows * tile.rows * (tile.values if used.name.endswith("values") else VALUES) // VALUES
    elif used.name.startswith("add_parts"):
        # sums are added up once for a part, of which 1024 keys are the fewest
        elements, warps = ADDING["ROWS"] * 1024, ADDING["num_warps"]
    elif used.name.startswith("table_gradient") and by_lag:
        elements, warps = tile.keys * tile.keys, max(1, tile.warps * tile.keys // tile.rows)
    return round(used.within * warps / 4 * 128 * 128 / elements)


def complaints(arch: str, name: str, tile: BackwardTile, used: Resources) -> list[str]:
    """What is wrong with a compiled kernel: spills beyond the allowance, no tensor cores in its loop."""
    return complaints_of(arch, name, used.name, shape(tile), used, products=not used.name.startswith("add_parts"))


def shape(tile: BackwardTile) -> str:
    return f"{tile.rows}x{tile.keys}"


def rows(arch: str, name: str, preferred_only: bool) -> Iterator[Row]:
    by_lag = CONFIGURATIONS[name].get("by_lag", True)
    for tile, used in report(arch, name, preferred_only):
        found, clocks = complaints(arch, name, tile, used), issue_clocks(tile, used, by_lag)
        yield Row(used.name, shape(tile), tile.warps, used, clocks, found)


if __name__ == "__main__":
    sys.exit(verdict(print_table(arguments(__doc__, CONFIGURATIONS), rows)))
