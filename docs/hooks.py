"""Fills measurements into pages when they are built, from the JSON that the benchmark wrote.

A line ``<!-- benchmark: NAME -->`` becomes the tables of ``benchmarks/results/NAME.json``, and the
picture ``pictures/NAME.png`` where there is one. Without that file it becomes a note that says so.

A line ``<!-- study: PART -->`` becomes that part of the study in ``benchmarks/results/study``, and
``<!-- study: figure NAME -->`` its picture ``pictures/study-NAME.svg``, where there is one.

Equations become MathML, which browsers set themselves: a page needs no script and no font for them.
"""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

from hypermlp_lab.bench.results import markdown

_ROOT = Path(__file__).resolve().parent.parent
_STUDY = re.compile(r"^<!-- study: (figure )?([\w-]+) -->$", re.MULTILINE)
_MARKER = re.compile(r"^<!-- benchmark: ([\w-]+) -->$", re.MULTILINE)
# what pymdownx.arithmatex makes of $...$ and $$...$$
_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_markdown(text: str, **_: Any) -> str:
    """Called by mkdocs for every page."""
    text = _MARKER.sub(lambda match: benchmark(match[1]), text)
    return _STUDY.sub(lambda match: picture(match[2]) if match[1] else study(match[2]), text)


def on_page_content(text: str, **_: Any) -> str:
    """Called by mkdocs for every page, once it is HTML."""
    return _EQUATION.sub(lambda match: equation(html.unescape(match[3]), block=match[2] == "["), text)


def equation(latex: str, *, block: bool) -> str:
    """An equation as MathML that keeps its source; one that cannot be read is an error of the build."""
    from math_core import LatexToMathML  # of the docs extra; the tests of this file need it not

    math = LatexToMathML(annotation=True).convert_with_local_state(latex, displaystyle=block)
    return f'<div class="equation">{math}</div>' if block else math


def study(part: str, root: Path = _ROOT) -> str:
    """A part of the study as Markdown."""
    folder = root / "benchmarks" / "results" / "study"
    if not any(folder.glob("*.jsonl")):
        if part != "answer":
            return ""
        return (
            '!!! note "Not measured yet"\n\n    There is nothing in `benchmarks/results/study`: `make study` writes it.'
        )
    from hypermlp_lab.study.presets import preset
    from hypermlp_lab.study.report import markdown
    from hypermlp_lab.study.results import Results

    return markdown(Results.read(preset("cpu"), folder), part)


def picture(name: str, root: Path = _ROOT) -> str:
    """A picture of the study, where there is one."""
    file = root / "docs" / "pictures" / f"study-{name}.svg"
    return f"![The study: {name}](pictures/study-{name}.svg)" if file.exists() else ""


def benchmark(name: str, root: Path = _ROOT) -> str:
    """The tables and the picture of one result."""
    result = root / "benchmarks" / "results" / f"{name}.json"
    if not result.exists():
        return f'!!! note "Not measured yet"\n\n    There is no `{result.relative_to(root)}`: `make bench` writes it.'
    picture = root / "docs" / "pictures" / f"{name}.png"
    image = f"![{name}: speed and memory against length](pictures/{name}.png)\n\n" if picture.exists() else ""
    return image + markdown(json.loads(result.read_text()))
