"""Pages that need nothing else: tables, pictures in them, and one template that all extend."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Table:
    """Rows of text under headings, with a caption that says what they are."""

    caption: str
    headings: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        lines = [self.headings, ["---"] * len(self.headings), *self.rows]
        return self.caption + "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def blank(height: float, width: float = 5.6) -> Figure:
    """An empty picture, in inches; by default narrow, so that a phone shows it legibly."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def svg(figure: Figure, name: str) -> str:
    """The picture as an SVG element, the same for the same data."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def saved(figure: Figure, kind: str, dpi: int) -> bytes:
    """The picture as a file of that kind, such as ``"png"``."""
    picture = io.BytesIO()
    figure.savefig(picture, format=kind, dpi=dpi)
    return picture.getvalue()


def png(figure: Figure) -> bytes:
    """The picture as PNG."""
    return saved(figure, "png", 150)


def drawn(pictures: Mapping[str, tuple[str, Figure]]) -> tuple[dict[str, dict[str, str]], dict[str, bytes]]:
    """Figures with captions, by name: what a template shows of each, and their files ``NAME.svg`` and ``NAME.png``."""
    shown: dict[str, dict[str, str]] = {}
    files: dict[str, bytes] = {}
    for name, (text, figure) in pictures.items():
        picture = svg(figure, name)
        files |= {f"{name}.svg": picture.encode(), f"{name}.png": png(figure)}
        shown[name] = {"text": text, "svg": inline(picture, name)}
    return shown, files


def inline(picture: str, name: str) -> str:
    """An SVG file as an element of a page: no header, no size of its own, names that no other picture has."""
    element = picture[picture.index("<svg") :]
    element = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", element, count=1)
    element = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", element, count=1)
    element = re.sub(r'\bid="', f'id="{name}-', element)
    return re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", element)


def render(template: Path, **values: Any) -> str:
    """The HTML page of a template, which may extend ``page.html.j2`` and import from ``page_parts.html.j2``."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader([template.parent, Path(__file__).parent])
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.get_template(template.name).render(**values)
