"""Compile the backward's kernels ahead of time, as ``report.py`` the forward's. ``make kernel-report`` runs both."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import torch
from report import ALLOWED_STACK, COLUMNS, CONFIGURATIONS, VALUES
from virtual_gpu import TARGETS, Resources, resources, virtual_gpu

from hypermlp_kernels import launch, launch_backward
from hypermlp_kernels.backward_plan import MixNeeds, Needs
from hypermlp_kernels.backward_tiles import BackwardTile, backward_tiles
from hypermlp_kernels.tiles import family_of

# in the order of virtual_gpu.KERNELS; some kernels are launched for two purposes
LAUNCHES = (
    "weight_gradient",
    "readout_statistic_gradient",
    "map_gradient",
    "table_gradient of readout",
    "table_gradient of routing",
    "turn of weights",
    "turn of scores",
    "key_product of values",
    "key_product of keys",
)


def call(
    length: int = 64, *, glu: bool = True, by_lag: bool = True, dtype: torch.dtype = torch.bfloat16, heads: int = 2,
    width: int = 64, values: int = VALUES, rank: int = 16, tile: BackwardTile | None = None, **options: Any,
) -> None:  # fmt: skip
    """One backward on zeros, of every gradient."""
    maps = 2 * heads if glu else heads

    def mix(count: int) -> launch.Mix:
        table = torch.zeros(count, 64, rank)
        return launch.Mix(torch.zeros(count, 64), table, table, torch.zeros(1, length, count, rank, dtype=dtype), True)

    q, v = torch.zeros(1, length, maps, width, dtype=dtype), torch.zeros(1, length, heads, values, dtype=dtype)
    z1, rho, z2 = (torch.zeros(1, length, *shape) for shape in ((maps, rank), (heads,), (heads, rank)))
    everything = MixNeeds(True, True, True, True)
    switches = {"glu": glu, "by_lag": by_lag, "norm": True, "eps": 1e-12, "causal": True, "max_lag": 64}
    launch_backward.backward(
        v.float(), v.float(), (z1, rho, z2), q, q, v, mix(maps), mix(heads),
        Needs(True, True, True, everything, everything), **switches, **options, tile=tile,
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
            for launched, compiled in zip(LAUNCHES, gpu.compiled(), strict=True):
                yield tile, resources(compiled)._replace(name=launched)


def issue_clocks(tile: BackwardTile, used: Resources, by_lag: bool) -> int:
    """Modelled clocks of one SM to issue the loop for 128 x 128 scores of a map, all its values: four a clock."""
    elements, warps = tile.rows * tile.keys, tile.warps
    if used.name == "weight_gradient":
        elements = tile.rows * tile.columns * tile.depth // VALUES
    elif used.name.startswith("key_product"):
        elements = tile.rows * tile.rows * (tile.values if used.name.endswith("values") else VALUES) // VALUES
    elif used.name.startswith("table_gradient") and by_lag:
        elements, warps = tile.keys * tile.keys, max(1, tile.warps * tile.keys // tile.rows)
    return round(used.loop.total() * warps / 4 * 128 * 128 / elements)


def complaints(arch: str, name: str, tile: BackwardTile, used: Resources) -> list[str]:
    """What is wrong with a compiled kernel: spills beyond the allowance, no tensor cores in its loop."""
    key = f"{arch} {name} {used.name} {tile.rows}x{tile.keys}"
    found = []
    allowed = ALLOWED_STACK.get(key, 0)
    if used.stack > allowed:
        found.append(f"{key}: {used.stack} bytes of stack, {allowed} allowed")
    if not used.tensor_instructions and name != "glu fp32":
        found.append(f"{key}: no tensor-core instruction in its loop")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--arch", nargs="*", default=["sm_80", "sm_90"], choices=[a for a in TARGETS if a.startswith("sm")]
    )
    parser.add_argument("--only", nargs="*", default=list(CONFIGURATIONS), choices=list(CONFIGURATIONS))
    parser.add_argument("--preferred", action="store_true", help="the first tile of each configuration alone")
    options = parser.parse_args()
    names = ("arch", "path", "kernel", "tile", "warps", "regs", "stack B", "smem B", "SASS", "loop", "clocks", *COLUMNS)
    print("| " + " | ".join(names) + " |")
    print("|" + " --- |" * len(names))
    found: list[str] = []
    for arch in options.arch:
        for name in options.only:
            for tile, used in report(arch, name, options.preferred):
                found += complaints(arch, name, tile, used)
                clocks = issue_clocks(tile, used, CONFIGURATIONS[name].get("by_lag", True))
                cells = (
                    arch, name, used.name, f"{tile.rows}x{tile.keys}", tile.warps,
                    *used[1:5], used.loop.total(), clocks, *(used.loop[column] for column in COLUMNS),
                )  # fmt: skip
                print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)
    print("\n".join(found), file=sys.stderr)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
