"""What the reports share: the command line, the table, and what is wrong with a compiled kernel."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from virtual_gpu import TARGETS, Resources

# of kernels with tensor cores, and of those without
COLUMNS = ("HGMMA", "HMMA", "UTCHMMA", "MFMA", "MUFU", "LDS", "STS", "LDSM", "SHFL", "LDGSTS", "BAR", "LDL")
BRIEF_COLUMNS = ("registers", "stack B", "shared B", "loop", "seldom", "tensor", "clocks")
PLAIN_COLUMNS = ("LDG", "LDS", "STS", "SHFL", "BAR", "MUFU", "LDL")

# the others are compiled and shown, but nobody has looked for good tiles there yet
JUDGED = ("sm_80", "sm_90")
# bytes of stack (spilled registers) known and accepted, compiled by Triton 3.7: see complaints_of() for the keys
ALLOWED_STACK: dict[str, int] = json.loads((Path(__file__).parent / "allowed_stack.json").read_text())


class Row(NamedTuple):
    """One kernel with one tile: how it is called in the table, and what it takes."""

    kernel: str
    shape: str
    warps: int
    used: Resources
    clocks: int
    complaints: list[str]


def complaints_of(arch: str, path: str, kernel: str, shape: str, used: Resources, products: bool = True) -> list[str]:
    """Spills beyond the allowance, no tensor cores in the loop of one that has ``products``."""
    if arch not in JUDGED:
        return []
    key = f"{arch} {path} {kernel} {shape}"
    found = []
    allowed = ALLOWED_STACK.get(key, 0)
    if used.stack > allowed:
        found.append(f"{key}: {used.stack} bytes of stack, {allowed} allowed")
    if products and not used.tensor_instructions and path != "glu fp32":
        found.append(f"{key}: no tensor-core instruction in its loop")
    return found


def arguments(description: str | None, paths: Iterable[str]) -> argparse.Namespace:
    """``arch``, ``only`` and ``preferred``."""
    paths = list(paths)
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--arch", nargs="*", default=["sm_80", "sm_90", "sm_100", "gfx942"], choices=list(TARGETS))
    parser.add_argument("--only", nargs="*", default=paths, choices=paths)
    parser.add_argument("--preferred", action="store_true", help="the first tile of each kernel alone")
    parser.add_argument("--brief", action="store_true", help="the columns that kernels/README.md shows")
    return parser.parse_args()


def table_line(cells: Iterable[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def brief_line(arch: str, path: str, row: Row) -> str:
    """What kernels/README.md says of a kernel."""
    used = row.used
    resources = (used.registers, used.stack, used.shared, used.loop.total(), used.seldom, used.tensor_instructions)
    return table_line((arch, path, row.kernel, row.shape, row.warps, *resources, row.clocks))


def full_line(arch: str, path: str, row: Row) -> str:
    used = row.used
    counts = (used.loop[column] for column in COLUMNS)
    loop = (used.loop.total(), used.seldom)
    return table_line((arch, path, row.kernel, row.shape, row.warps, *used[1:5], *loop, row.clocks, *counts))


def print_table(options: argparse.Namespace, rows: Callable[[str, str, bool], Iterable[Row]]) -> list[str]:
    """One line for each row of ``rows(arch, path, preferred)``, as it comes; returns all complaints."""
    names = (
        "arch", "path", "kernel", "tile", "warps", "regs", "stack B", "smem B", "SASS", "loop", "seldom", "clocks",
        *COLUMNS,
    )  # fmt: skip
    line = full_line
    if options.brief:
        names, line = ("arch", "path", "kernel", "tile", "warps", *BRIEF_COLUMNS), brief_line
    print(table_line(names))
    print("|" + " --- |" * len(names))
    found: list[str] = []
    for arch in options.arch:
        for path in options.only:
            for row in rows(arch, path, options.preferred):
                found += row.complaints
                print(line(arch, path, row), flush=True)
    return found


def spills_of(arch: str, path: str, used: Resources, allowed: dict[str, int]) -> list[str]:
    """Of a kernel without tensor cores and with one tile: spills beyond the allowance."""
    key = f"{arch} {path} {used.name.removesuffix('_kernel')}"
    if arch not in JUDGED or used.stack <= allowed.get(key, 0):
        return []
    return [f"{key}: {used.stack} bytes of stack, {allowed.get(key, 0)} allowed"]


def print_plain_table(
    archs: Iterable[str], paths: Iterable[str], report: Callable[[str, str], Iterable[Resources]]
) -> list[str]:
    """One line for each kernel of ``report(arch, path)``; returns all complaints."""
    names = ("arch", "path", "kernel", "regs", "stack B", "smem B", "SASS", "loop", *PLAIN_COLUMNS)
    print(table_line(names))
    print("|" + " --- |" * len(names))
    found: list[str] = []
    for arch in archs:
        for path in paths:
            for used in report(arch, path):
                found += spills_of(arch, path, used, ALLOWED_STACK)
                cells = (arch, path, used.name.removesuffix("_kernel"), *used[1:5], used.loop.total())
                counts = (used.loop[column] for column in PLAIN_COLUMNS)
                print(table_line((*cells, *counts)), flush=True)
    return found


def verdict(complaints: list[str]) -> int:
    """Say what is wrong; the exit status."""
    print("\n".join(complaints), file=sys.stderr)
    return bool(complaints)
