"""Tables indexed by position, for images or sequences of another size."""

from __future__ import annotations

from math import isqrt
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypermlp.checks import as_integer, check_kind
from hypermlp.integrations.sites import replaced_sites
from hypermlp.integrations.swap import tell_adapters
from hypermlp.integrations.tables import replace_tables, rows_of
from hypermlp.layers import HyperMLP

Grid = int | tuple[int, int]


class _Resize(NamedTuple):
    """From one grid to another; a sequence is a grid of one line."""

    old: tuple[int, int]
    new: tuple[int, int]
    prefix: int

    @property
    def rows(self) -> int:
        return self.prefix + self.new[0] * self.new[1]

    @property
    def coarser(self) -> float:
        """Old positions for each new one."""
        return (self.old[0] * self.old[1]) / (self.new[0] * self.new[1])


def resize_positions(
    model: nn.Module, grid: Grid, *, old_grid: Grid | None = None, prefix_tokens: int | None = None
) -> int:
    """Interpolate the position-indexed tables of a model's hyper layers, in place, for another grid of tokens.

    Row ``j`` of a table belongs to token ``j``, so a layer for 14 x 14 patches does not fit 16 x 16, and a
    smaller grid would read the wrong rows. Rows of prefix tokens (class token, registers, which come
    first) stay as they are; the others are interpolated, bicubic over a grid and linear along a
    sequence, with antialiasing where it shrinks.

    A sequence mixing is ``Diag(1 + diag) + down Diag(core) up^T``. ``diag`` and ``up`` say what happens at a
    position, so they keep their values. ``down`` sums over all positions; its values are multiplied by
    old tokens / new tokens, so that the sum over a finer grid of the same image is what it was, and the
    low-rank term keeps its share beside the identity. The same grid changes nothing.

    Parameters become new objects: make the optimiser afterwards. Layers with tables by lag have nothing
    to resize. An error changes nothing.

    Args:
        model: a model, or one layer.
        grid: patches as ``(height, width)``, or the length of a sequence, which layers of a vision model
            do not take; prefix tokens not counted.
        old_grid: what the tables are for; by default all rows but the prefix, as a square where
            ``grid`` is ``(height, width)``.
        prefix_tokens: tokens before the grid; by default what ``old_grid`` leaves over, or 0.

    Returns:
        The number of layers resized.

    Raises:
        ValueError: no layer has such tables, they do not fit ``old_grid`` and ``prefix_tokens``, or they are sharded,
            pruned or parametrised.
    """
    check_kind("model", model, nn.Module)
    if prefix_tokens is not None:
        prefix_tokens = as_integer("prefix_tokens", prefix_tokens, 0)
    new = _checked("grid", grid)
    layers = [m for m in model.modules() if isinstance(m, HyperMLP) and m.config.layout == "position"]
    if not layers:
        raise ValueError(
            f"no hyper layer of {type(model).__name__} has tables by position (layout='position'): "
            "tables by lag fit every length, and hypermlp.extend_max_lag makes their window longer"
        )
    line = not isinstance(grid, (tuple, list))
    if line and any(whole_grid in layer._forward_pre_hooks.values() for layer in layers):
        raise ValueError(
            f"grid={grid} is the length of a sequence, and this model sees pictures: say patches as (height, width), "
            f"({grid}, {grid}) for {grid} lines of {grid}, (1, {grid}) for one line"
        )
    plans = {rows: _plan(rows, new, line, old_grid, prefix_tokens) for rows in map(rows_of, layers)}
    replaced_sites(model)  # refuses, before anything changes, what is itself a replacement
    replace_tables(
        {layer: plans[rows_of(layer)].rows for layer in layers},
        lambda name, table: _resized(name, table, plans[table.shape[1]]),
    )
    tell_adapters(model)
    return len(layers)


def whole_grid(layer: nn.Module, args: tuple[Any, ...]) -> None:
    """A forward pre-hook: fewer tokens than rows would read the rows of other places of an image."""
    assert isinstance(layer, HyperMLP)
    rows, tokens = rows_of(layer), args[0].shape[1]
    if tokens != rows:
        raise ValueError(
            f"this layer has tables for {rows} positions and got {tokens} tokens: for another image size call "
            f"hypermlp.integrations.resize_positions(model, (height, width)) with the grid of patches, "
            f"or swap with max_lag={tokens}"
        )


def fit_grid(layer: nn.Module) -> None:
    """Let a layer of a vision model refuse images that its tables are not for."""
    if isinstance(layer, HyperMLP) and layer.config.layout == "position" and (layer.routing_mix or layer.readout_mix):
        layer.register_forward_pre_hook(whole_grid)


def _checked(name: str, grid: Grid) -> tuple[int, int]:
    sides = grid if isinstance(grid, (tuple, list)) else (1, grid)
    if len(sides) != 2:
        raise ValueError(f"{name} must be (height, width) or a length, got {grid!r}")
    height, width = (as_integer(name, side, 1, "(height, width), or a length") for side in sides)
    return height, width


def _plan(rows: int, new: tuple[int, int], line: bool, old_grid: Grid | None, prefix: int | None) -> _Resize:
    if old_grid is not None:
        old = _checked("old_grid", old_grid)
        if isinstance(old_grid, (tuple, list)) == line:
            raise ValueError(f"grid and old_grid must both be lengths or both grids, got old_grid={old_grid!r}")
        left = rows - old[0] * old[1]
        if left < 0 or prefix not in (None, left):
            raise ValueError(f"the tables have {rows} rows, which is not {old_grid} and {prefix or 0} prefix tokens")
        return _Resize(old, new, left)
    prefix = prefix or 0
    if prefix >= rows:
        raise ValueError(f"prefix_tokens must be from 0 to {rows - 1} for tables of {rows} rows, got {prefix!r}")
    side = isqrt(rows - prefix)
    if line:
        return _Resize((1, rows - prefix), new, prefix)
    if side * side != rows - prefix:
        raise ValueError(
            f"the tables have {rows} rows, {rows - prefix} without {prefix} prefix tokens, which is no square: "
            "say prefix_tokens= (class token, registers) or old_grid=(height, width)"
        )
    return _Resize((side, side), new, prefix)


def _resized(name: str, table: Tensor, plan: _Resize) -> Tensor:
    """``[heads, rows, ...]`` for the new grid."""
    if plan.old == plan.new:
        return table.clone()
    prefix, places = table[:, : plan.prefix], table[:, plan.prefix :]
    heads, width = places.shape[0], places[0, 0].numel()
    image = places.reshape(heads, *plan.old, width).permute(0, 3, 1, 2)
    image = image.to(torch.promote_types(image.dtype, torch.float32))
    mode = "bilinear" if plan.old[0] == plan.new[0] == 1 else "bicubic"
    image = F.interpolate(image, plan.new, mode=mode, antialias=True) * (plan.coarser if name == "down" else 1.0)
    places = image.permute(0, 2, 3, 1).reshape(heads, -1, *table.shape[2:]).to(table.dtype)
    return torch.cat((prefix, places), dim=1)
