"""The page of a look inside: one file that needs nothing else, and its pictures."""

from __future__ import annotations

from pathlib import Path

from hypermlp_lab.inspect import figures
from hypermlp_lab.inspect.views import LayerView, heads_table
from hypermlp_lab.page import inline, png, render, svg
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
    drawn: dict[str, dict[str, str]] = {}
    files: dict[str, bytes] = {}
    for name, (caption, figure) in figures.figures(views).items():
        picture = svg(figure, name)
        files |= {f"{name}.svg": picture.encode(), f"{name}.png": png(figure)}
        drawn[name] = {"text": caption, "svg": inline(picture, name)}
    template = Path(__file__).parent / "report.html.j2"
    page = render(template, figures=drawn, heads=heads_table(views), model=model, source=source, text=text)
    for name, content in {**files, PAGE: page.encode()}.items():
        replace_file(folder / name, content)
    return folder / PAGE
