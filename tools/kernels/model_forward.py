"""The forward's cost model, from compiled kernels: what ``plan.py`` holds as ``COSTS``, and the tables made of it.

    python tools/kernels/model_forward.py

Kernels are compiled for a Hopper GPU with their preferred tiles; the rest is arithmetic. Nothing is timed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from report_forward import DESIGNS, call, clocks_of_block
from virtual_gpu import resources, virtual_gpu

from hypermlp_kernels.plan import (
    BYTES_PER_CLOCK,
    COSTS,
    SCORES,
    Chunk,
    Clocks,
    Cost,
    Tiles,
    Widths,
    chunks,
    map_products,
    modelled_clocks,
    readout_clocks,
    slot_rows,
    statistics_clocks,
    stores,
)
from hypermlp_kernels.tiles import Precision, Tile, tiles

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "ieee": torch.float32}
# the case that the tables are about: score maps of an eighth of a head's values
BATCH, LENGTH, CHANNELS, VALUES, WIDTH, RANK = 4, 4096, 1024, 512, 64, 16
LIMIT = 256 * 2**20
MULTIPROCESSORS, CLOCKS_PER_SECOND = 132, 1.7e9


def counted(precision: Precision, glu: bool, values: int = VALUES) -> dict[str, float]:
    """Clocks to issue what is beside the products, for 128 x 128 scores of a head and one block of values.

    By kernel, and ``storing`` for the statistics that store the map: Hopper GPU, preferred tiles.
    """
    found = {}
    for design, kernels in DESIGNS.items():
        chosen = {kernel: tiles(kernel, precision, values, "hopper")[0] for kernel in kernels}
        with virtual_gpu("sm_90") as gpu:
            call(
                glu=glu, dtype=DTYPES[precision], allow_tf32=precision == "tf32", width=WIDTH, values=values, rank=RANK,
                chosen=chosen, design=design,
            )  # fmt: skip
            used = {one.name.removesuffix("_kernel"): one for one in map(resources, gpu.compiled())}
        for kernel, tile in chosen.items():
            # without tensor cores they are ordinary instructions, 128 multiplications and additions a clock
            products = _width(kernel, glu, tile) * SCORES / 128 if precision == "ieee" else 0.0
            name = "storing" if design == "store" and kernel == "selection_statistics" else kernel
            found[name] = clocks_of_block(tile, used[kernel]) - products
    return found


def _width(kernel: str, glu: bool, tile: Tile) -> int:
    """Multiplications and additions of a kernel for one score."""
    maps = 0 if kernel == "stored_readout" else (WIDTH + RANK) * (2 if glu else 1)
    return maps + (0 if kernel == "routing_statistic" else RANK) + tile.values


def cost(precision: Precision) -> Cost:
    """``COSTS[precision]`` counted again.

    What a channel of values costs is the difference of the stored readout at two widths of its tile.
    """
    one, two = (counted(precision, glu) for glu in (False, True))
    tile = preferred(precision, VALUES)
    wide, narrow = tile.stored_readout.values, tile.stored_readout.values // 2
    channel = (two["stored_readout"] - counted(precision, True, narrow)["stored_readout"]) / (wide - narrow)
    weights = two["stored_readout"] - channel * wide
    beside_map = weights + channel * tile.readout.values
    return Cost(
        map=(round(one["readout"] - beside_map), round(two["readout"] - beside_map)),
        select=(round(one["selection_statistics"]), round(two["selection_statistics"])),
        store=round(two["storing"] - two["selection_statistics"]),
        weights=round(weights),
        channel=round(channel, 1),
        rate=COSTS[precision].rate,
    )


def preferred(precision: Precision, values: int) -> Tiles:
    """The tiles that the choice of the design is about."""
    kernels = ("selection_statistics", "readout", "stored_readout")
    return Tiles(*(tiles(kernel, precision, values, "hopper")[0] for kernel in kernels))


def widths_of(precision: Precision, glu: bool, values: int) -> Widths:
    return Widths(precision, glu, values // 8, values, RANK, 2 if precision == "bf16" else 4)


def parts_of(precision: Precision, values: int) -> tuple[int, list[Chunk]]:
    """Rows of a slot of the stored map, and the chunks."""
    names = ("selection_statistics", "stored_readout")
    rows = slot_rows(*(tiles(kernel, precision, values, "hopper") for kernel in names))
    size = widths_of(precision, True, values).element_size
    heads = CHANNELS // values
    return rows, chunks(-(-LENGTH // rows), BATCH * heads, rows, LENGTH, size, LIMIT, grows=True)


def choice_table() -> Iterator[str]:
    """Thousands of modelled clocks for 128 x 128 scores of a head, made again / stored, by the values of a head."""
    cases = {
        "GLU bfloat16": ("bf16", True), "ReLU bfloat16": ("bf16", False), "GLU float16": ("fp16", True),
        "GLU tf32": ("tf32", True), "GLU float32": ("ieee", True),
    }  # fmt: skip
    values = (128, 256, 512, 1024)
    yield "| values of a head | " + " | ".join(map(str, values)) + " |"
    yield "|" + " --- |" * (1 + len(values))
    for name, (precision, glu) in cases.items():
        cells = []
        for width in values:
            rows, parts = parts_of(precision, width)
            widths = widths_of(precision, glu, width)
            both = modelled_clocks(widths, preferred(precision, width), parts, rows, MULTIPROCESSORS)
            shown = [f"{clocks / 1000:.1f}" if clocks < 1e5 else f"{clocks / 1000:.0f}" for clocks in both]
            taken = stores(*both)
            shown[taken] = f"**{shown[taken]}**"
            cells.append(" / ".join(shown))
        yield f"| {name} | " + " | ".join(cells) + " |"


def pass_table(routing_issue: float) -> Iterator[str]:
    """The passes of HyperGLU in bfloat16: tensor cores, issue, and what a stored map moves."""
    precision: Precision = "bf16"
    widths, tile = widths_of(precision, True, VALUES), preferred(precision, VALUES)
    routing = Clocks(routing_issue, map_products(widths, tiles("routing_statistic", precision, VALUES, "hopper")[0]))
    moved = 2 * SCORES * widths.element_size / BYTES_PER_CLOCK
    yield "| pass | tensor cores | issue | scratch | sum | ms |"
    yield "|" + " --- |" * 6
    for stored in (False, True):
        reading = tile.stored_readout if stored else tile.readout
        blocks = -(-VALUES // reading.values)
        one = readout_clocks(widths, reading, stored)
        passes = {
            "`z1`": routing,
            "`rho`, `z2`" + (" and the map stored" if stored else ""): statistics_clocks(
                widths, tile.statistics, stored
            ),
            f"readout, {blocks} x {reading.values} channels" + (", from it" if stored else ""): Clocks(
                one.issue * blocks, one.products * blocks
            ),
        }
        for name, clocks in passes.items():
            yield _pass_row(name, clocks, 0)
        every = Clocks(*(sum(column) for column in zip(*passes.values(), strict=True)))
        yield _pass_row("**all, stored**" if stored else "**all, made again**", every, moved * stored)


def _pass_row(name: str, clocks: Clocks, moved: float) -> str:
    rows = LENGTH // 128
    tiles_of_processor = BATCH * CHANNELS // VALUES * rows * (rows + 1) / 2 / MULTIPROCESSORS
    total = sum(clocks) + moved
    milliseconds = total * tiles_of_processor / CLOCKS_PER_SECOND * 1000
    shown = (clocks.products, clocks.issue, moved, total)
    return f"| {name} | " + " | ".join(f"{x:.0f}" for x in shown) + f" | {milliseconds:.2f} |"


def main() -> int:
    for precision in COSTS:
        print(f'    "{precision}": {cost(precision)},', flush=True)
    print()
    print(*choice_table(), "", *pass_table(counted("bf16", True)["routing_statistic"]), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
