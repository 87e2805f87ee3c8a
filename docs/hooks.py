"""Fills measurements into pages when they are built, from the JSON that the benchmark wrote.

A line ``<!-- benchmark: NAME -->`` becomes the tables of ``benchmarks/results/NAME.json``, and the
picture ``pictures/NAME.png`` where there is one. Without that file it becomes a note that says so.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from hypermlp_lab.bench.results import markdown

_ROOT = Path(__file__).resolve().parent.parent
_MARKER = re.compile(r"^<!-- benchmark: ([\w-]+) -->$", re.MULTILINE)


def on_page_markdown(text: str, **_: Any) -> str:
    """Called by mkdocs for every page."""
    return _MARKER.sub(lambda match: benchmark(match[1]), text)


def benchmark(name: str, root: Path = _ROOT) -> str:
    """The tables and the picture of one result."""
    result = root / "benchmarks" / "results" / f"{name}.json"
    if not result.exists():
        return f'!!! note "Not measured yet"\n\n    There is no `{result.relative_to(root)}`: `make bench` writes it.'
    picture = root / "docs" / "pictures" / f"{name}.png"
    image = f"![{name}: speed and memory against length](pictures/{name}.png)\n\n" if picture.exists() else ""
    return image + markdown(json.loads(result.read_text()))
