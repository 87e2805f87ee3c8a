"""Draws ``lag_layout.svg``: how one piece of memory holds scores by key position and by lag.

The addresses come from :class:`hypermlp.ops.lag_layout.ScoreBuffer` itself, so the picture shows
what the code does. Run by ``make pictures``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from hypermlp.ops import lag_layout
from hypermlp.ops.lag_layout import Layout, ScoreBuffer

TOKENS = 4
COLOURS = ("#1b6ca8", "#4ea3d8", "#9ccbea", "#d6eaf7")  # lag 0 first
INK, FAINT = "#1d2733", "#9aa5b1"


def addresses() -> tuple[list[list[int]], list[list[int]]]:
    """Where each view of a tile of all tokens finds its elements: ``[query][key]``, ``[query][column]``."""
    layout = Layout(TOKENS, TOKENS, by_lag=True, causal=True)
    alignment, lag_layout._ALIGNMENT = lag_layout._ALIGNMENT, 1  # rows of 8 rather than 16: a smaller picture
    try:
        buffer = ScoreBuffer(layout, 1, TOKENS, torch.empty(0, dtype=torch.long))
    finally:
        lag_layout._ALIGNMENT = alignment
    buffer._storage.copy_(torch.arange(buffer._storage.numel()))
    (tile,) = layout.tiles(TOKENS)
    return buffer.by_key(tile)[0].tolist(), buffer.by_column(tile).tolist()


def cell(axes: Axes, x: float, y: float, lag: int | None, text: str, note: str = "") -> None:
    """One element; ``lag`` None is one that is no visible score."""
    style: dict[str, Any] = {"facecolor": "white", "hatch": "///"} if lag is None else {"facecolor": COLOURS[lag]}
    edge = "#d5dbe1" if lag is None else "white"
    axes.add_patch(Rectangle((x, y), 1, 1, edgecolor=edge, linewidth=1.2, **style))
    ink = FAINT if lag is None else ("white" if lag < 2 else INK)
    axes.text(x + 0.5, y + 0.42, text, ha="center", va="center", fontsize=10, color=ink)
    axes.text(x + 0.93, y + 0.9, note, ha="right", va="top", fontsize=6.5, color=ink)


def draw_matrix(axes: Axes, where: list[list[int]], lag_of: Any, heads: list[str], title: str) -> None:
    for i, row in enumerate(where):
        for column, address in enumerate(row):
            lag = lag_of(i, column)
            text = "" if lag is None else f"s({i},{i - lag})"
            cell(axes, column, -i, lag, text, str(address))
        axes.text(-0.2, 0.5 - i, f"query {i}", ha="right", va="center", fontsize=9, color=INK)
    for column, head in enumerate(heads):
        axes.text(column + 0.5, 1.12, head, ha="center", va="bottom", fontsize=9, color=INK)
    axes.set_title(title, fontsize=11, color=INK, pad=22)
    axes.set(xlim=(-1.6, TOKENS + 0.2), ylim=(1 - TOKENS - 0.1, 1.1), aspect="equal")
    axes.axis("off")


def draw_memory(axes: Axes, by_key: list[list[int]], by_column: list[list[int]]) -> None:
    visible = {by_key[i][j]: (i, i - j) for i in range(TOKENS) for j in range(i + 1)}
    row_stride = by_column[1][0] - by_column[0][0]
    for address in range(TOKENS * row_stride):
        i, lag = visible.get(address, (None, None))
        cell(axes, address, 0, lag, "" if lag is None else f"{i},{i - lag}")
        axes.text(address + 0.5, -0.08, str(address), ha="center", va="top", fontsize=6.5, color=FAINT)
    for rows, y, side in ((by_key, 1.25, 1), (by_column, -0.75, -1)):
        stride = rows[1][0] - rows[0][0]
        for i, row in enumerate(rows):
            axes.plot([row[0] + 0.08, row[-1] + 0.92], [y, y], color=INK, linewidth=1.5)
            axes.text((row[0] + row[-1] + 1) / 2, y + 0.2 * side, f"query {i}", ha="center",
                      va="bottom" if side > 0 else "top", fontsize=8, color=INK)  # fmt: skip
        name = "by key" if side > 0 else "by lag"
        axes.text(-0.4, y, f"{name}: rows {stride} apart", ha="right", va="center", fontsize=9, color=INK)
    axes.text(-0.4, 0.5, "memory", ha="right", va="center", fontsize=9, color=INK)
    axes.set(xlim=(-7.2, TOKENS * row_stride), ylim=(-1.5, 2.0), aspect="equal")
    axes.axis("off")


def draw() -> Figure:
    matplotlib.rcParams.update({"svg.hashsalt": "lag_layout", "svg.fonttype": "path", "hatch.color": "#e6eaee"})
    by_key, by_column = addresses()
    figure = Figure(figsize=(10.5, 6.2), facecolor="white", layout="constrained")
    FigureCanvasSVG(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=(2.3, 1))
    keys = [f"key {j}" for j in range(TOKENS)]
    lags = [f"lag {TOKENS - 1 - column}" for column in range(TOKENS)]
    draw_matrix(
        figure.add_subplot(grid[0, 0]), by_key, lambda i, j: i - j if j <= i else None, keys,
        "written by the score product: a column is a key",
    )  # fmt: skip
    draw_matrix(
        figure.add_subplot(grid[0, 1]), by_column,
        lambda i, column: TOKENS - 1 - column if TOKENS - 1 - column <= i else None, lags,
        "read by the mixing: a column is a lag",
    )  # fmt: skip
    draw_memory(figure.add_subplot(grid[1, :]), by_key, by_column)
    return figure


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".svg")
    draw().savefig(target, metadata={"Date": None})
