"""Records of runs, a line of JSON each; what is on the disk is whole but for a last line cut short."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypermlp_lab.study.runs import Run
from hypermlp_lab.training.files import make_folder, naming, replace_file, write_synced


def read(file: Path) -> dict[Run, dict[str, Any]]:
    """The records in ``file``, by their run; none if there is no file. A last line that was cut short is left out.

    Raises:
        ValueError: a line is not of a study.
    """
    if not file.exists():
        return {}
    with naming(file, "cannot be read"):
        lines = file.read_bytes().split(b"\n")
    # what comes after the last line end was not written to its end
    return dict(_record(file, number, line) for number, line in enumerate(lines[:-1], 1) if line)


def mend(file: Path) -> None:
    """Take away a last line that was cut short, so that the next record starts on a line of its own."""
    if file.exists():
        content = file.read_bytes()
        if content and not content.endswith(b"\n"):
            replace_file(file, content[: content.rfind(b"\n") + 1])


def append(file: Path, record: dict[str, Any]) -> None:
    """Add one record, and wait until it is on the disk."""
    make_folder(file.parent)
    write_synced(file, json.dumps(record, separators=(",", ":")).encode() + b"\n", append=True)


def _record(file: Path, number: int, line: bytes) -> tuple[Run, dict[str, Any]]:
    try:
        record = json.loads(line)
        return Run.from_dict(record["run"]), record
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file}, line {number}, is not a record of this study ({error}): restore the file, or choose another --out"
        ) from error
