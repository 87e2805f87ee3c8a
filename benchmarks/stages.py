"""Runs commands one after another inside one budget of time, and records what became of each.

Every stage is a process of its own: an error that ends a CUDA context, a hang or a crash ends that stage
alone. The results are on disk after every stage.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_TAIL = 4000
# a line of pytest -v, alone or under pytest-xdist
_OUTCOME = re.compile(r"(?:^|\s)(PASSED|FAILED|SKIPPED|ERROR)(?:\s|$)")
_FAILURE = re.compile(r"^(?:FAILED|ERROR) (\S+::.*)$")
_ENDED_TEST = re.compile(r"(?:(?:FAILED|ERROR)\s+(\S+::\S.*?)|^(\S+::\S.*?)\s+(?:FAILED|ERROR))\s*(?:\[\s*\d+%\])?\s*$")


@dataclass(frozen=True)
class Stage:
    """A command with its limits.

    Attributes:
        name: in the results.
        what: one line for a reader.
        command: its arguments.
        limit: seconds that it may take.
        least: seconds below which it is not worth starting.
        environment: variables beside those there are.
        prevented: why it cannot run here, or None.
        notes: from its output and exit status to what the results keep, such as ``"failures"``; a reason
            under ``"refused"`` says that it could not run here after all.
    """

    name: str
    what: str
    command: Sequence[str]
    limit: float
    least: float = 10.0
    environment: dict[str, str] = field(default_factory=dict)
    prevented: Callable[[], str | None] = lambda: None
    notes: Callable[[str, int | None], dict[str, Any]] = lambda output, status: {}


def run_stages(
    stages: Sequence[Stage],
    seconds: float,
    report: dict[str, Any],
    out: Path,
    log: Callable[[str], None] = print,
    name: str = "device-check",
) -> dict[str, Any]:
    """Run stages in order while time is left; a stage that fails does not keep the next from running.

    Args:
        stages: the most important first.
        seconds: for all of them together.
        report: what the results say besides; gets ``"stages"``, ``"seconds"`` and ``"failed"``.
        out: folder for ``<name>.json`` and ``<name>.log``, written as stages end.
        log: takes lines for a reader.
        name: of those files.

    Returns:
        The report.
    """
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    report["stages"] = []
    log_file = out / f"{name}.log"
    log_file.write_text("")
    for stage in stages:
        left = seconds - (time.monotonic() - start)
        result = _run(stage, left, log_file, log)
        report["stages"].append({"name": stage.name, "what": stage.what, **result})
        log(f"{stage.name}: {result['status']}" + (f", {result['reason']}" if result["reason"] else ""))
        for failure in result["notes"].get("failures", [])[:20]:
            log(f"    {failure}")
        report["seconds"] = round(time.monotonic() - start, 1)
        report["failed"] = [r["name"] for r in report["stages"] if r["status"] in ("failed", "timed out")]
        report["not_run"] = [r["name"] for r in report["stages"] if r["status"] == "not run"]
        _write(out / f"{name}.json", report)
    return report


def _run(stage: Stage, left: float, log_file: Path, log: Callable[[str], None]) -> dict[str, Any]:
    nothing = {"status": "not run", "reason": None, "exit_status": None, "seconds": 0.0, "notes": {}, "tail": ""}
    reason = stage.prevented()
    if reason is not None:
        return nothing | {"reason": reason}
    if left < stage.least:
        return nothing | {"reason": f"{max(left, 0):.0f} s were left, it needs {stage.least:.0f}"}
    limit = min(stage.limit, left)
    log(f"{stage.name}: {stage.what} (at most {limit:.0f} s)")
    with log_file.open("a") as file:
        file.write(f"\n===== {stage.name}: {' '.join(stage.command)}\n")
    offset = log_file.stat().st_size
    start = time.monotonic()
    with log_file.open("ab") as file:
        process = subprocess.Popen(
            stage.command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env=os.environ | stage.environment, start_new_session=True,
        )  # fmt: skip
        try:
            status: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            # its children too, such as the workers of pytest: a group of its own
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    with log_file.open("rb") as file:
        file.seek(offset)
        output = file.read().decode(errors="replace")
    outcome = "timed out" if status is None else "failed" if status else "passed"
    reason = {"timed out": f"stopped after {limit:.0f} s", "failed": f"exit status {status}"}.get(outcome)
    notes = stage.notes(output, status)
    if refused := notes.pop("refused", None):
        outcome, reason = "not run", refused
    return {
        "status": outcome,
        "reason": reason,
        "exit_status": status,
        "seconds": round(time.monotonic() - start, 1),
        "notes": notes,
        "tail": "" if outcome == "passed" else output[-_TAIL:],
    }


def pytest_notes(output: str, status: int | None) -> dict[str, Any]:
    """Counts of outcomes and the tests that failed, also from the output of a run that was cut off."""
    counts = dict.fromkeys(("PASSED", "FAILED", "SKIPPED", "ERROR"), 0)
    ended: list[str] = []
    summary: list[str] = []
    for line in output.splitlines():
        if found := _FAILURE.match(line):
            summary.append(found[1])
        elif "::" in line and (outcome := _OUTCOME.search(line)):
            counts[outcome[1]] += 1
            if test := _ENDED_TEST.search(line):
                ended.append(test[1] or test[2])
    return {**{name.lower(): count for name, count in counts.items()}, "failures": summary or ended}


def _write(path: Path, report: dict[str, Any]) -> None:
    """Whole or not at all: the process may be stopped at any moment."""
    beside = path.with_suffix(".partial")
    beside.write_text(json.dumps(report, indent=1) + "\n")
    beside.replace(path)
