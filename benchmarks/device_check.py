"""``make device-check``: GPU tests, then benchmarks, in one command that ends in time and says what failed.

Needs no network and no virtual environment: a Python with torch, triton and, for its tests, pytest. Writes to
``--out``: ``device-check.json`` (hardware, versions, commit, each stage's outcome), its ``.log``, and the
benchmarks' own JSON. ``make device-smoke`` is the first look, without pytest: ``device-smoke.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.stages import Stage, pytest_notes, run_stages

ROOT = Path(__file__).resolve().parents[1]
TESTS = "tests/kernels/device"
_SANITIZER_FOUND_SOMETHING = 99
_MOST_WORKERS = 14
_LONGEST_TEST = 60


def stages(out: Path) -> list[Stage]:
    """What is run, the most important first. The limits are chosen so that the first six always fit."""

    def no_pytest() -> str | None:
        return None if find_spec("pytest") else "pytest is not installed"

    def no_sanitizer() -> str | None:
        return None if shutil.which("compute-sanitizer") else "compute-sanitizer is not on this machine"

    def tests(name: str, what: str, file: str, limit: float, parallel: bool = True) -> Stage:
        # compiling takes most of the time, and it is one core's work: many processes share the GPU
        workers = min(_MOST_WORKERS, (os.cpu_count() or 1) - 2)
        spread = ["-n", str(workers)] if parallel and workers > 1 and find_spec("xdist") else []
        options = ["-vv", "-m", "", "--tb=short", "-rfEs", "-p", "no:cacheprovider", "--color=no", *spread]
        if find_spec("pytest_timeout"):
            # a kernel that hangs costs one test: the process ends, and pytest-xdist starts another
            options += ["--timeout", str(_LONGEST_TEST), "--timeout-method", "thread"]
        command = [sys.executable, "-m", "pytest", f"{TESTS}/{file}", *options]
        return Stage(name, what, command, limit, prevented=no_pytest, notes=pytest_notes)

    bench = partial(_bench, out)

    def sanitizer(tool: str, what: str, limit: float) -> Stage:
        command = [
            "compute-sanitizer", "--tool", tool, "--error-exitcode", str(_SANITIZER_FOUND_SOMETHING),
            sys.executable, f"{TESTS}/sanitized.py",
        ]  # fmt: skip
        # one allocation for each tensor, so that a neighbour is not mistaken for the tensor itself
        separate = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return Stage(tool, what, command, limit, 20.0, separate, no_sanitizer, _sanitizer_notes)

    return [
        tests("forward", "forward kernels against float64", "test_device_forward.py", 130),
        bench("attention", "operators, forward", 80),
        tests("gradients", "gradients against float64", "test_device_gradients.py", 110),
        tests("habits", "strides, autocast, compilation", "test_device_habits.py", 50),
        tests("curves", "200 training steps beside the chunked path", "test_device_training.py", 50, parallel=False),
        tests("decoding", "decoding kernels against float64", "test_device_decode.py", 50),
        tests("convolution", "short convolution against PyTorch's", "test_device_short_conv.py", 40),
        tests("large", "offsets beyond 32 bits, long rows", "test_device_large.py", 60, parallel=False),
        sanitizer("memcheck", "accesses out of bounds", 45),
        bench("training", "operators, forward and backward", 100),
        sanitizer("racecheck", "races in shared memory", 60),
        bench("decode", "one token after a context", 60),
        bench("layers", "whole layers", 60),
        bench("models", "training steps of whole models", 80),
    ]


def smoke_stages(out: Path) -> list[Stage]:
    """The first look: right or not, and one row of figures."""
    path, limit = out / "smoke-cuda.json", 125
    command = [sys.executable, "-m", "benchmarks.device_smoke", "--out", str(path), "--seconds", f"{limit - 5}"]
    cases = Stage("smoke", "ten cases in each precision", command, limit, notes=partial(_smoke_notes, path))
    return [cases, _bench(out, "row", "one size, forward and backward", 50)]


def _bench(out: Path, name: str, what: str, limit: float) -> Stage:
    path = out / f"{name}-cuda.json"
    # it stops by itself in time to be written whole
    command = [sys.executable, "-m", "benchmarks.device_bench", name, "--out", str(path)]
    command += ["--seconds", f"{limit - 25:.0f}"]
    return Stage(name, what, command, limit, least=40.0, notes=partial(_bench_notes, path))


def _smoke_notes(path: Path, output: str, status: int | None) -> dict[str, Any]:
    """How many cases were judged, and which are wrong."""
    if not path.is_file():
        return {"written": None}
    rows = json.loads(path.read_text())
    failures = [f"{row['dtype']} {row['case']}: {'; '.join(row['failures'])}" for row in rows if row["failures"]]
    return {"written": path.name, "cases": len(rows), "failures": failures}


def _bench_notes(path: Path, output: str, status: int | None) -> dict[str, Any]:
    """Where the figures are, and what failed its gate."""
    if not path.is_file():
        return {"written": None}
    report = json.loads(path.read_text())
    failures = [f"{v['provider']} failed its check: {v['reason']}" for v in report["gate"] if not v["passed"]]
    measured = sum(row["skipped"] is None for row in report["rows"])
    return {"written": path.name, "rows": measured, "skipped": len(report["rows"]) - measured, "failures": failures}


def _sanitizer_notes(output: str, status: int | None) -> dict[str, Any]:
    """The tool's own summary; a device that it does not support is no finding."""
    lines = [line.removeprefix("=========").strip() for line in output.splitlines() if line.startswith("=========")]
    for line in lines:
        if "not supported" in line.lower():
            return {"refused": line}
    failures = [line for line in lines if line.startswith(("Invalid", "Error", "Race", "Warning: Race"))]
    return {"summary": [line for line in lines if "SUMMARY" in line], "failures": failures[:20]}


def facts() -> dict[str, Any]:
    """Hardware and versions, asked for in another process: this one stays clear of CUDA."""
    program = "import json; from hypermlp_lab.bench.environment import describe; print(json.dumps(describe('cuda')))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no output"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        smi = subprocess.run(query, capture_output=True, text=True, timeout=30)
        found["driver, largest clock, power limit"] = smi.stdout.strip() or smi.stderr.strip()
    return found


def main(arguments: list[str] | None = None, log: Callable[[str], None] = print) -> int:
    """Status 0 if every stage that ran passed, 1 if one failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, default=default, help="folder for results (default: $OUT or %(default)s)")
    parser.add_argument("--seconds", type=float, help="for everything (default: 470, of --smoke 175)")
    parser.add_argument("--smoke", action="store_true", help="the first look alone")
    parser.add_argument("--only", nargs="*", help="names of stages")
    parser.add_argument("--commit", help="what to record where the checkout has no git")
    options = parser.parse_args(arguments)
    name, seconds = ("device-smoke", 175.0) if options.smoke else ("device-check", 470.0)
    chosen = (smoke_stages if options.smoke else stages)(options.out.resolve())
    unknown = set(options.only or ()) - {stage.name for stage in chosen}
    if unknown:
        parser.error(f"no stages {sorted(unknown)}, there are {[stage.name for stage in chosen]}")
    os.chdir(ROOT)
    sources = [str(ROOT / folder) for folder in ("", "kernels", "benchmarks")]
    path = [*sources, *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ |= {"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}
    environment = facts()
    if options.commit and not environment.get("commit"):
        environment["commit"] = options.commit
    log(json.dumps(environment, indent=1))
    if "error" in environment:
        log(f"No GPU that PyTorch can use here: {environment['error']}. Nothing was checked.")
        return 2
    if options.only:
        chosen = [stage for stage in chosen if stage.name in options.only]
    seconds = seconds if options.seconds is None else options.seconds
    report = run_stages(chosen, seconds, {"schema": 1, "environment": environment}, options.out, log, name)
    log(f"{report['seconds']:.0f} s. Results: {options.out / name}.json")
    for result in report["stages"]:
        log(f"  {result['name']:<10} {result['status']:<9} {result['seconds']:6.1f} s  {result['reason'] or ''}")
    log("FAILED: " + ", ".join(report["failed"]) if report["failed"] else "Nothing that ran failed.")
    if report["not_run"]:
        log("NOT RUN: " + ", ".join(report["not_run"]))
    return bool(report["failed"])


if __name__ == "__main__":
    sys.exit(main())
