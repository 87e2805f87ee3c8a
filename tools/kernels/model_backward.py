"""The backward's projected times, from compiled kernels: launch by launch, for shapes and amounts of scratch.

    python tools/kernels/model_backward.py

HyperGLU in bfloat16, causal and by lag, on a Hopper GPU. A launch takes the longer of its memory traffic and of its
programs' issue and products (one after the other, programs in their order on all multiprocessors), and 2 microseconds
more. Kernels are compiled; the rest is arithmetic. Nothing is timed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from heapq import heapify, heapreplace
from math import ceil
from typing import Any, NamedTuple

from model_forward import CHANNELS, CLOCKS_PER_SECOND, MULTIPROCESSORS, RANK, SCORES, VALUES, WIDTH
from report_backward import issue_clocks, report, tiles_of

from hypermlp_kernels.backward_plan import PART_KEYS, Chunk, Plan, Sizes, Split
from hypermlp_kernels.backward_tiles import BackwardTile

NAME, MAPS, HEADS = "glu bf16", 2, CHANNELS // VALUES
BYTES_PER_SECOND, FLOP_PER_CLOCK = 3e12, 4096
LAUNCH, ADDING = 2e-6, 4e-6
ELEMENT, SUM = 2, 4  # bytes of a plane's elements, and of sums


class Kernel(NamedTuple):
    """FLOP and bytes of scratch for a score of a map, of which it takes ``maps``."""

    flop: int
    bytes: int
    maps: int = 1


_MAPS_AGAIN = MAPS * (2 * WIDTH + 2 * RANK)
KERNELS = {
    "weight_gradient": Kernel(2 * VALUES, ELEMENT),
    "readout_statistic_gradient": Kernel(2 * RANK, ELEMENT),
    "map_gradient": Kernel(_MAPS_AGAIN + 2 * RANK + MAPS * 2 * RANK, (2 + MAPS) * ELEMENT),
    "table_gradient of readout": Kernel(4 * RANK, 2 * ELEMENT),
    # by lag, scores of two key tiles
    "table_gradient of routing": Kernel(4 * WIDTH + 4 * RANK, ELEMENT, MAPS),
    "turn of weights": Kernel(2 * RANK, 2 * ELEMENT),
    "key_product of values": Kernel(2 * VALUES, ELEMENT),
    "turn of scores": Kernel(2 * RANK + 2 * WIDTH, 2 * ELEMENT, MAPS),
    "key_product of keys": Kernel(2 * WIDTH, ELEMENT, MAPS),
}
# what a part of a row makes more, in tiles, and the width of its sums
PARTS = {
    "readout_statistic_gradient": (0, RANK),
    "map_gradient": (0.5, MAPS * RANK),
    "turn of weights": (1, 0),
    "turn of scores": (1, MAPS * WIDTH),
}
# what a key gets of a map
PRODUCTS = {"key_product of values": VALUES, "key_product of keys": WIDTH}


class Clocks(NamedTuple):
    """For 128 x 128 scores of a map: to issue the loops of :data:`KERNELS`, on whole rows and in parts."""

    whole: dict[str, int]
    parts: dict[str, int]


def counted() -> Clocks:
    """Of the preferred tile's kernels."""
    found = {used.name: issue_clocks(tile, used, by_lag=True) for tile, used in report("sm_90", NAME, True)}
    whole = {name: found[name] for name in KERNELS}
    return Clocks(whole, {name: found.get(f"{name} in parts", clocks) for name, clocks in whole.items()})


def plan_of(batch: int, length: int, tile: BackwardTile) -> Plan:
    """Of rows without a window."""
    most, step = ceil(length / tile.keys), tile.rows // tile.keys
    return Plan(ceil(length / tile.rows), HEADS * batch, most // step, most, step)


def sizes_of(tile: BackwardTile) -> Sizes:
    return Sizes((2 + MAPS) * tile.rows * tile.keys * ELEMENT, tile.rows * MAPS * WIDTH * SUM)


def programs(name: str, chunk: Chunk, plan: Plan, tile: BackwardTile, length: int) -> Iterator[float]:
    """Scores of each program of a launch, of one map, in the order of the grid."""
    blocks = [(block, plan.tiles_before(block + 1) - plan.tiles_before(block)) for block in range(chunk.stop)]
    own = [tiles for _, tiles in reversed(blocks[chunk.first :])]
    scores = tile.rows * tile.keys
    if name == "weight_gradient":
        for column in range(ceil(plan.most * tile.keys / tile.columns)):
            yield from (tile.rows * tile.columns for tiles in own if column * tile.columns < tiles * tile.keys)
    elif name.startswith("table_gradient"):
        for window in range(ceil(length / tile.keys)):
            for rest in range(plan.heads):
                first, stop = (ceil((x - rest) / plan.heads) for x in (chunk.first, chunk.stop))
                units = min(stop * plan.step, ceil(length / tile.keys)) - max(first * plan.step, window)
                yield max(units, 0) * tile.keys * tile.keys
    elif name.startswith("key_product"):
        width_blocks = VALUES // tile.values if name.endswith("values") else 1
        for block in range(plan.num_blocks):
            for rest in range(plan.heads):
                first, stop = (ceil((x - rest) / plan.heads) for x in (chunk.first, chunk.stop))
                rows = max(min(stop, plan.num_blocks) - max(first, block), 0)
                yield from [rows * tile.rows * tile.rows / width_blocks] * width_blocks
    else:
        more = PARTS[name][0] if chunk.parts > 1 else 0
        for part in range(chunk.parts):
            for tiles in own:
                of_part = min(tiles, (part + 1) * chunk.span) - part * chunk.span
                yield max(of_part + more, 0) * scores if of_part > 0 else 0


def longest_processor(found: Iterable[float]) -> float:
    """What the busiest multiprocessor has to do, where each takes the next program when it is done with one."""
    busy = [0.0] * MULTIPROCESSORS
    heapify(busy)
    for one in found:
        heapreplace(busy, busy[0] + one)
    return max(busy)


def launch_seconds(
    name: str, chunk: Chunk, plan: Plan, tile: BackwardTile, length: int, clocks: Clocks, busy: bool = False
) -> float:
    """A launch's time; ``busy``: as if every multiprocessor had the same to do."""
    kernel = KERNELS[name]
    split = chunk.parts > 1 and name in PARTS
    of_score = (clocks.parts if split else clocks.whole)[name] / SCORES + kernel.flop / FLOP_PER_CLOCK
    work = [scores * of_score for scores in programs(name, chunk, plan, tile, length)] * kernel.maps
    longest = sum(work) / MULTIPROCESSORS if busy else longest_processor(work)
    moved = chunk.tiles * tile.rows * tile.keys * kernel.bytes * kernel.maps
    if name in PRODUCTS:
        # added to what the chunks before have left
        width = VALUES // tile.values if name == "key_product of values" else 1
        moved += 2 * sum(scores > 0 for scores in work) // width * tile.rows * PRODUCTS[name] * SUM
    adding = 0.0
    if split and PARTS[name][1]:
        # written, and read again
        moved += 2 * chunk.blocks * chunk.parts * tile.rows * PARTS[name][1] * SUM
        adding = ADDING
    return max(longest / CLOCKS_PER_SECOND, moved / BYTES_PER_SECOND) + LAUNCH + adding


def milliseconds(batch: int, length: int, clocks: Clocks, limit: int = 2**40, whole: bool = False) -> float:
    """Of a backward with ``limit`` bytes of scratch; ``whole``: rows are never split. Without a limit all are busy."""
    tile = tiles_of("sm_90", NAME)[0]
    plan, sizes = plan_of(batch, length, tile), sizes_of(tile)
    busy = limit == 2**40
    split = Split(PART_KEYS // tile.keys, 0 if whole or busy else MULTIPROCESSORS)
    found = plan.chunks(limit, sizes, split)
    times = (launch_seconds(name, chunk, plan, tile, length, clocks, busy) for chunk in found for name in KERNELS)
    return 1000 * sum(times)


def sums_table(clocks: Clocks) -> Iterator[str]:
    """For 128 x 128 scores of a head: clocks of issue and of tensor cores, and the scratch's traffic."""
    issue = sum(clocks.whole[name] * kernel.maps for name, kernel in KERNELS.items())
    flop = sum(kernel.flop * kernel.maps for kernel in KERNELS.values())
    moved = sum(kernel.bytes * kernel.maps for kernel in KERNELS.values())
    yield "| issue | tensor cores | FLOP a score | bytes a score | clocks of the bytes |"
    yield "|" + " --- |" * 5
    moving = moved * SCORES / BYTES_PER_SECOND * CLOCKS_PER_SECOND * MULTIPROCESSORS
    yield f"| {issue} | {flop * SCORES // FLOP_PER_CLOCK} | {flop} | {moved} | {moving:.0f} |"


def times_table(clocks: Clocks) -> Iterator[str]:
    """Milliseconds by shape and scratch."""
    shapes = (16, 1024), (4, 4096), (2, 8192), (1, 16384), (1, 32768)
    cases: dict[str, dict[str, Any]] = {
        "all multiprocessors busy": {},
        "512 MB of scratch, whole rows alone": {"limit": 512 * 2**20, "whole": True},
        "256 MB": {"limit": 256 * 2**20},
        "**512 MB**": {"limit": 512 * 2**20},
        "1 GB": {"limit": 2**30},
    }
    yield "| B, T | " + " | ".join(f"{batch}, {length}" for batch, length in shapes) + " |"
    yield "|" + " --- |" * (1 + len(shapes))
    for name, options in cases.items():
        times = (milliseconds(*shape, clocks, **options) for shape in shapes)
        yield f"| {name} | " + " | ".join(_rounded(time) for time in times) + " |"


def _rounded(time: float) -> str:
    return f"{time:.{2 if time < 2 else 1 if time < 10 else 0}f}"


def main() -> int:
    clocks = counted()
    print(*sums_table(clocks), "", *times_table(clocks), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
