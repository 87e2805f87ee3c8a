"""The page of a look inside: one file that needs nothing else, and its pictures."""

from __future__ import annotations

from pathlib import Path

from hypermlp_lab.inspect import figures
from hypermlp_lab.inspect.views import LayerView, heads_table
from hypermlp_lab.page import drawn, render
from hypermlp_lab.training.files import replace_file

PAGE = "index.html"


def write(views: list[LayerView], folder: Path, *, model: str, source: str, text: str) -> Path:
    """Write the page and its pictures into ``folder``.

    Args:
        views: the layers.
        folder: is made if missing.
        model: what was looked into, in a sentence.
        source: where the text came from, likewise.
        text: the text itself.

    Returns:
        The page's file.
    """
    shown, files = drawn(figures.figures(views))
    template = Path(__file__).parent / "report.html.j2"
    page = render(template, figures=shown, heads=heads_table(views), model=model, source=source, text=text)
    for name, content in {**files, PAGE: page.encode()}.items():
        replace_file(folder / name, content)
    return folder / PAGE
