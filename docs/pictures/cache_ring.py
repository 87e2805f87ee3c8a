"""Draws ``cache_ring.svg``: how the cache of a layer with a window holds an endless stream.

Token numbers and segments come from :class:`hypermlp.cache.ring.Ring` itself. Run by ``make pictures``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from hypermlp.cache.ring import Ring

WINDOW, SPARE = 6, 2
MOMENTS = (5, 8, 11)
COLOURS = ("#1b6ca8", "#9ccbea")  # older segment, newer segment
INK, FAINT = "#1d2733", "#9aa5b1"


def memory_after(count: int) -> tuple[list[int], list[list[int]]]:
    """Token number in each slot (-1 for none) after ``count`` tokens, and the window's segments, oldest first."""
    ring = Ring(torch.zeros(1, 1, 1, 1, dtype=torch.long), WINDOW + SPARE)
    ring.data.fill_(-1)
    for token in range(count):
        ring.append(torch.full((1, 1, 1, 1), token), token)
    window = ring.tokens(max(0, count - WINDOW), count)
    return ring.data.flatten().tolist(), [segment.flatten().tolist() for segment in window]


def draw_row(axes: Axes, y: float, count: int) -> None:
    slots, segments = memory_after(count)
    for slot, token in enumerate(slots):
        place = next((i for i, segment in enumerate(segments) if token in segment), None)
        face = "white" if place is None or token < 0 else COLOURS[place + 2 - len(segments)]
        axes.add_patch(Rectangle((slot, y), 1, 1, facecolor=face, edgecolor="#d5dbe1", linewidth=1.2))
        ink = FAINT if face == "white" else ("white" if face == COLOURS[0] else INK)
        axes.text(
            slot + 0.5, y + 0.5, "" if token < 0 else str(token), ha="center", va="center", fontsize=10, color=ink
        )
    read = " and ".join(f"{segment[0]} to {segment[-1]}" for segment in segments)
    axes.text(-0.3, y + 0.5, f"after {count} tokens", ha="right", va="center", fontsize=9, color=INK)
    axes.text(len(slots) + 0.3, y + 0.5, f"reads tokens {read}", ha="left", va="center", fontsize=9, color=INK)


def draw() -> Figure:
    matplotlib.rcParams.update({"svg.hashsalt": "cache_ring", "svg.fonttype": "path"})
    figure = Figure(figsize=(8.5, 3), facecolor="white", layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    for row, count in enumerate(MOMENTS):
        draw_row(axes, -1.4 * row, count)
    for slot in range(WINDOW + SPARE):
        axes.text(slot + 0.5, 1.12, f"slot {slot}", ha="center", va="bottom", fontsize=7, color=FAINT)
    axes.set(xlim=(-3.2, WINDOW + SPARE + 4.6), ylim=(-1.4 * (len(MOMENTS) - 1) - 0.1, 1.5), aspect="equal")
    axes.set_title(f"max_lag = {WINDOW}, max_crop = {SPARE}: numbers are tokens", fontsize=10, color=INK)
    axes.axis("off")
    return figure


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".svg")
    draw().savefig(target, metadata={"Date": None})
