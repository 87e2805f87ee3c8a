"""The tables of a model's hyper layers, replaced by longer or shorter ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from hypermlp.layers import HyperMLP
from hypermlp.layers.sequence_mixing import LagMixing

_TABLES = ("diag", "down", "up")


def rows_of(layer: HyperMLP) -> int:
    """Rows of a layer's tables."""
    rows = layer.config.max_lag
    assert rows is not None
    return rows


@torch.no_grad()
def replace_tables(rows: Mapping[HyperMLP, int], make: Callable[[str, Tensor], Tensor]) -> None:
    """Give layers other tables, in place, and configs that say so. Tables that are shared stay shared.

    Args:
        rows: what each layer's tables are to have.
        make: from the name and the values of a table, ``[heads, rows, ...]``, the new ones with so many rows.

    Raises:
        ValueError: a table is sharded, pruned or parametrised; nothing changes.
    """
    mixes = {m: count for x, count in rows.items() for m in (x.routing_mix, x.readout_mix) if m is not None}
    for mix in mixes:
        _check_plain(mix)
    made: dict[int, nn.Parameter] = {}
    with torch.inference_mode(False):
        for mix, count in mixes.items():
            for name in _TABLES:
                table = getattr(mix, name)
                if table is not None:
                    if id(table) not in made:
                        made[id(table)] = nn.Parameter(make(name, table), requires_grad=table.requires_grad)
                    setattr(mix, name, made[id(table)])
            mix.max_lag = count
    for layer, count in rows.items():
        layer.config = replace(layer.config, max_lag=count)


def _check_plain(mix: LagMixing) -> None:
    """ValueError where a table is no parameter of the module itself, of its whole size."""
    for name in _TABLES:
        table = getattr(mix, name)
        if table is not None and name not in mix._parameters:
            raise ValueError(
                f"the table {name!r} is computed from other parameters: make that permanent first, by "
                "torch.nn.utils.prune.remove or parametrize.remove_parametrizations"
            )
        if type(table).__name__ == "DTensor":
            raise ValueError(
                "the tables are sharded (DTensor): change their length before fully_shard or parallelize_module"
            )
