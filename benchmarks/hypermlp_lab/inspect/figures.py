"""Pictures of a look inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hypermlp_lab.inspect.views import LayerView
from hypermlp_lab.page import blank

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# of Okabe and Ito, told apart by colour-blind readers
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_COLUMNS = 2
_Pictures = dict[str, tuple[str, "Figure"]]
# a line: values by lag or rank, its label, whether it is dotted
_Lines = list[tuple[Tensor, str, bool]]


def figures(views: list[LayerView]) -> _Pictures:
    """All pictures by name, with what they show in a sentence; none of what no layer has."""
    found: _Pictures = {}
    column = _column(views[0])
    for index, layer in enumerate(views):
        text = (
            f"{layer.name}: what each token (down) weighs values by, at each {_column(layer)}. Red: added, blue: taken."
        )
        found[f"weights-{index}"] = (text, _images(list(layer.weights), layer.heads, _column(layer), "token"))
    found["reach"] = (
        "How far back each head reads: the share of the absolute weight within each lag.",
        _panels(views, ("share within the lag",), _reach, "lag"),
    )
    if any(layer.active_by_distance is not None for layer in views):
        found["active"] = (
            "The share of active lags: how often the selection leaves a token at each lag.",
            _panels(views, ("share active",), _active, "lag"),
        )
    sides = ("first mixing", "second mixing")
    if any(any(layer.responses) for layer in views):
        found["diagonal"] = (
            f"What each {column} is multiplied by: the identity and the learned diagonal.",
            _panels(views, sides, _diagonals, column),
        )
    if any(any(layer.ranks) for layer in views):
        found["low-rank"] = (
            f"The low-rank part for a typical token: the size of what it writes at each {column} (full) and of what it "
            "makes of each (dotted).",
            _panels(views, sides, _low_ranks, column),
        )
        for index, layer in enumerate(views):
            found |= _responses(index, layer)
        found["ranks"] = (
            "Ranks in use: mean square of what each adds to the map (full) and of what it reads, z1 and z2 (dotted).",
            _panels(views, sides, _ranks, "rank", log=True),
        )
    return found


def _column(layer: LayerView) -> str:
    return "lag" if layer.by_lag else "position"


def _responses(index: int, layer: LayerView) -> _Pictures:
    """The low-rank part as an image for each map."""
    images, names = [], []
    for side, (which, maps) in enumerate((("first", layer.maps), ("second", layer.heads))):
        response = layer.responses[side]
        if response is not None and response.low_rank is not None:
            images += list(response.low_rank)
            names += [f"{which}, {name}" for name in maps]
    if not images:
        return {}
    column = _column(layer)
    text = f"{layer.name}: what the low-rank part makes of a one at each {column} (down) at each, for a typical token."
    return {f"response-{index}": (text, _images(images, names, f"{column} written", f"{column} read"))}


def _reach(layer: LayerView, _: int) -> _Lines:
    return _lines(layer.reach.by_distance.cumsum(-1), layer.heads)


def _active(layer: LayerView, _: int) -> _Lines:
    return [] if layer.active_by_distance is None else _lines(layer.active_by_distance, layer.heads)


def _diagonals(layer: LayerView, side: int) -> _Lines:
    response = layer.responses[side]
    return [] if response is None else _lines(response.diag, _names(layer, side))


def _low_ranks(layer: LayerView, side: int) -> _Lines:
    response = layer.responses[side]
    if response is None or response.read is None or response.written is None:
        return []
    return _pairs(response.written, response.read, _names(layer, side))


def _ranks(layer: LayerView, side: int) -> _Lines:
    use = layer.ranks[side]
    return [] if use is None else _pairs(use.added, use.read, _names(layer, side))


def _lines(values: Tensor, names: list[str]) -> _Lines:
    return [(y, name, False) for y, name in zip(values, names, strict=True)]


def _pairs(full: Tensor, dotted: Tensor, names: list[str]) -> _Lines:
    lines: _Lines = []
    for one, other, name in zip(full, dotted, names, strict=True):
        lines += [(one, name, False), (other, "", True)]
    return lines


def _names(layer: LayerView, side: int) -> list[str]:
    return layer.heads if side else layer.maps


def _panels(
    views: list[LayerView],
    sides: tuple[str, ...],
    lines: Callable[[LayerView, int], _Lines],
    xlabel: str,
    *,
    log: bool = False,
) -> Figure:
    """A row of panels for each layer, with a line for each head or map."""
    figure = blank(0.5 + 1.7 * len(views))
    for row, layer in enumerate(views):
        for side, title in enumerate(sides):
            axes = figure.add_subplot(len(views), len(sides), row * len(sides) + side + 1)
            axes.set_title(f"{layer.name}, {title}", fontsize=7)
            _draw(axes, lines(layer, side), log=log)
            if row == len(views) - 1:
                axes.set_xlabel(xlabel, fontsize=8)
    return figure


def _draw(axes: Any, lines: _Lines, *, log: bool) -> None:
    axes.tick_params(labelsize=7)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if not lines:
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", va="center", fontsize=8, color="#777777")
        axes.set_xticks([])
        axes.set_yticks([])
        return
    full = 0
    for values, label, dotted in lines:
        # a dotted line goes with the full one before it
        color = _COLORS[(full - dotted) % len(_COLORS)]
        axes.plot(values.tolist(), color=color, ls=":" if dotted else "-", lw=1.1, label=label or None)
        full += not dotted
    if log and any(bool((values > 0).any()) for values, *_ in lines):
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6)


def _images(images: list[Tensor], names: list[str], xlabel: str, ylabel: str) -> Figure:
    """Heat maps on one scale, cut at the size that one in a hundred exceeds."""
    rows = -(-len(images) // _COLUMNS)
    figure = blank(0.4 + 2.7 * rows)
    sizes = torch.cat([image[~image.isnan()].abs() for image in images])
    most = float(sizes.sort().values[int(0.99 * (len(sizes) - 1))]) or 1.0
    shown: Any = None
    for index, (image, name) in enumerate(zip(images, names, strict=True)):
        axes = figure.add_subplot(rows, _COLUMNS, index + 1, title=name, facecolor="#eeeeee")
        shown = axes.imshow(
            image.cpu().numpy(), cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto", interpolation="none"
        )
        axes.title.set_fontsize(8)
        axes.tick_params(labelsize=7)
        if index % _COLUMNS == 0:
            axes.set_ylabel(ylabel, fontsize=8)
        if index >= len(images) - _COLUMNS:
            axes.set_xlabel(xlabel, fontsize=8)
    figure.colorbar(shown, ax=figure.axes, shrink=0.7).ax.tick_params(labelsize=7)
    return figure
