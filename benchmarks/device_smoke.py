"""The first look at a GPU: ten calls in each precision, forward and backward, by the tests' own rule, within minutes.

Needs torch, triton and einops alone. Compiling takes most of the time, so many processes share the GPU; the report is
written as each case ends, those of the layers' own sizes first. Run by ``make device-smoke``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hypermlp.ops import SequenceMix
from hypermlp.ops.arguments import Needs, OperatorArgs, Options
from hypermlp.ops.self_check import Errors
from hypermlp.ops.self_check_cases import backward_errors, forward_errors
from hypermlp.ops.varlen import Tokens
from hypermlp_lab.training.files import write_json

# float32 last: its kernels without tensor cores compile longest
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MOST_WORKERS = 15


class Shape(NamedTuple):
    """Widths and switches of a call."""

    selection: str = "glu"
    heads: int = 2
    score_width: int = 64
    value_width: int = 512
    ranks: tuple[int, int] = (16, 16)
    layout: str = "lag"
    causal: bool = True
    norm: bool = True
    gated: bool = True
    masked: bool = False
    packed: bool = False
    long: bool = False  # rows that the backward takes in parts


CASES = {
    "glu": Shape(),
    "relu": Shape("relu", score_width=128),
    "glu, padding": Shape(masked=True),
    "glu, packed": Shape(packed=True),
    "glu, narrow heads": Shape(heads=4, score_width=16, value_width=64),
    "relu, narrow heads, padding": Shape("relu", heads=4, score_width=32, value_width=64, masked=True),
    "glu, long rows": Shape(value_width=192, long=True),
    "glu, by position, bidirectional": Shape(layout="position", causal=False, value_width=128),
    "relu, no norm, no gates, odd widths": Shape("relu", 3, 20, 33, (5, 3), norm=False, gated=False),
    "glu, no mixing": Shape(ranks=(0, 0), value_width=256),
}


def call_of(shape: Shape, dtype: torch.dtype, device: str) -> OperatorArgs:
    """A call of that shape, whose values nobody reads: the check makes its own."""
    length, maps = 2048 if shape.long else 64, shape.heads * (2 if shape.selection == "glu" else 1)

    def zeros(*sizes: int) -> Tensor:
        return torch.zeros(sizes, dtype=dtype, device=device)

    def mixing(heads: int, rank: int) -> SequenceMix:
        if not rank:
            return SequenceMix()
        down, up = (zeros(heads, length, rank) for _ in range(2))
        return SequenceMix(zeros(heads, length), down, up, zeros(1, length, heads, rank) if shape.gated else None)

    valid = torch.ones(1, length, dtype=torch.bool, device=device) if shape.masked else None
    bounds = torch.tensor([0, length], device=device, dtype=torch.int32) if shape.packed else None
    limit = length if any(shape.ranks) else None
    options = Options(shape.selection, shape.norm, 1e-12, shape.causal, shape.layout, limit)
    return OperatorArgs(
        zeros(1, length, maps, shape.score_width), zeros(1, length, maps, shape.score_width),
        zeros(1, length, shape.heads, shape.value_width), mixing(maps, shape.ranks[0]),
        mixing(shape.heads, shape.ranks[1]), Tokens(valid, bounds), options,
    )  # fmt: skip


def judge(name: str, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Both directions of one case, as a row of the report."""
    start = time.monotonic()
    row: dict[str, Any] = {"case": name, "dtype": str(dtype).removeprefix("torch."), "errors": {}, "failures": []}
    x = call_of(CASES[name], dtype, device)
    needs = Needs.of([y is not None for y in x.tensors])
    checks: dict[str, Callable[[], Errors]] = {
        "forward": lambda: forward_errors(x), "backward": lambda: backward_errors(x, needs),
    }  # fmt: skip
    for direction, check in checks.items():
        try:
            errors = check()
        except Exception as error:  # whatever a compiler or a driver raises
            row["failures"].append(f"{direction}: {type(error).__name__}: {' '.join(str(error).split())[:500]}")
            continue
        row["errors"] |= {what: list(judged) for what, judged in errors.items()}
        row["failures"] += [f"{what}: {x.made:.2e} > {x.allowed:.2e}" for what, x in errors.items() if not x.right]
    row["seconds"] = round(time.monotonic() - start, 1)
    return row


def rows(device: str, names: Sequence[str], workers: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Of every case in every precision, as they end: each in a process of its own, so that none ends another."""
    end = time.monotonic() + seconds
    jobs = [(name, str(dtype).removeprefix("torch.")) for dtype in DTYPES for name in names]

    def run(name: str, dtype: str) -> dict[str, Any]:
        row = {"case": name, "dtype": dtype, "errors": {}}
        command = [sys.executable, "-m", "benchmarks.device_smoke", "--device", device, "--one", name, dtype]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=max(1.0, end - time.monotonic()), env=environment
            )
            found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        except subprocess.TimeoutExpired:
            return row | {"failures": ["the time was over"]}
        except (IndexError, ValueError):
            last = " ".join(done.stderr.split())[-500:]
            return row | {"failures": [f"the process ended with status {done.returncode}: {last}"]}
        return found

    with ThreadPoolExecutor(max(1, workers)) as pool:
        for future in as_completed([pool.submit(run, *job) for job in jobs]):
            yield future.result()


def main(arguments: list[str] | None = None) -> int:
    """Status 1 where a case is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--device", default="cuda", help="cpu with TRITON_INTERPRET=1 tries the code itself, slowly")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--workers", type=int, default=min(_MOST_WORKERS, (os.cpu_count() or 1) - 1))
    parser.add_argument("--seconds", type=float, default=120.0, help="for all cases together")
    parser.add_argument("--one", nargs=2, metavar=("CASE", "DTYPE"), help="judge this one here, and print its row")
    options = parser.parse_args(arguments)
    if options.one:
        name, dtype = options.one
        print(json.dumps(judge(name, getattr(torch, dtype), options.device)))
        return 0
    report: list[dict[str, Any]] = []
    for row in rows(options.device, options.cases, options.workers, options.seconds):
        report.append(row)
        if options.out:
            write_json(options.out, report, indent=1)
        print(f"{row['dtype']:<9} {row['case']}: {'; '.join(row['failures']) or 'right'}", flush=True)
    wrong = sum(bool(row["failures"]) for row in report)
    print(f"{len(report) - wrong} of {len(report)} right")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
