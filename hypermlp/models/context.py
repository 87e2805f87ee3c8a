"""A longer context for a trained model: tables by lag get rows for lags that it has not seen."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from hypermlp.checks import as_integer, check_choice, check_kind
from hypermlp.integrations.sites import find_sites, holds_replacements, replaced_sites
from hypermlp.integrations.swap import tell_adapters
from hypermlp.integrations.tables import replace_tables, rows_of
from hypermlp.layers import HyperMLP

Fill = Literal["identity", "continue"]

# the share of the old rows whose mean goes on, so that no row's noise does
_LAST = 8


def extend_max_lag(model: nn.Module, max_lag: int, *, fill: Fill = "identity") -> int:
    """Give the lag tables of a model's hyper layers rows up to ``max_lag``, in place.

    A layer with tables for ``L`` lags is a window over the last ``L`` tokens; afterwards each token reads ``max_lag``.
    The rows of the first ``L`` lags stay as they are, and with them what a sequence of up to ``L`` tokens gives.

    Args:
        model: a layer, a language model, a model of the Hugging Face family or a swapped one. Their configs follow.
        max_lag: the new number of lags. Layers that know as many already are left alone, as are baselines and layers
            by position.
        fill: ``"identity"``: the new rows mix nothing, diagonal and tables are zero. ``"continue"``: each table goes
            on as the mean of its last eighth.

    Returns:
        The number of layers extended. An error changes nothing.

    Raises:
        TypeError: ``max_lag`` is no integer.
        ValueError: no hyper layer is by lag, all know at least ``max_lag`` lags, ``fill`` is unknown, a host's sliding
            window is shorter, or tables are sharded, pruned or parametrised.

    The new rows are not learnt: train afterwards, for until then tokens beyond the old window read worse than before.
    The guide has figures under "Long sequences".

    Parameters become new objects: make the optimizer afterwards, and wrap and shard afterwards. A cache that is being
    filled is of the old window and is refused: begin a new one. Time and memory of a cached token grow with the
    window, parameters by ``heads * (max_lag - L) * (1 + 2 rank)`` for each mixing of each map.

    Example:
        >>> layer = HyperMLP(64, max_lag=128)
        >>> extend_max_lag(layer, 512)
        1
        >>> layer.routing_mix.up.shape
        torch.Size([2, 512, 16])
    """
    check_kind("model", model, nn.Module)
    max_lag = as_integer("max_lag", max_lag)
    check_choice("fill", fill, get_args(Fill))
    layers = [m for m in model.modules() if isinstance(m, HyperMLP) and m.config.layout == "lag"]
    if not layers:
        others = any(isinstance(m, HyperMLP) for m in model.modules())
        instead = "; tables by position: hypermlp.integrations.resize_positions(model, grid)" if others else ""
        raise ValueError(f"no hyper layer of {type(model).__name__} is by lag: there is nothing to extend{instead}")
    short = dict.fromkeys((layer for layer in layers if rows_of(layer) < max_lag), max_lag)
    if not short:
        raise ValueError(
            f"max_lag must be more than the {min(map(rows_of, layers))} lags that every layer knows, got {max_lag}"
        )
    _check_windows(model, short, max_lag)
    replace_tables(short, lambda _, table: _extended(table, max_lag, fill))
    _note(model, short, max_lag)
    return len(short)


def _check_windows(model: nn.Module, short: Collection[HyperMLP], max_lag: int) -> None:
    """ValueError where a host's masks hide what the layer would read."""
    for site, known in replaced_sites(model):
        if known.window is not None and known.layer in short and max_lag > known.window:
            raise ValueError(
                f"max_lag={max_lag} is longer than the sliding window of {known.window} of {site.names[0]}: the host's "
                "masks hide what is further back; extend layers without a window one by one: extend_max_lag(layer, ...)"
            )


def _extended(table: Tensor, max_lag: int, fill: Fill) -> Tensor:
    """``[heads, max_lag, ...]`` whose first rows are ``table``."""
    heads, lags, *width = table.shape
    more = table.new_zeros(heads, max_lag - lags, *width)
    if fill == "continue":
        more += table[:, -max(1, lags // _LAST) :].mean(1, keepdim=True)
    return torch.cat((table, more), dim=1)


def _note(model: nn.Module, short: Collection[HyperMLP], max_lag: int) -> None:
    """Let the configs that models are saved with say what the layers are now."""
    tell_adapters(model)
    family = sys.modules.get("hypermlp.models.huggingface.modeling")
    configs: dict[int, Any] = {}
    for module in model.modules():
        if not any(part in short for part in module.modules()):
            continue
        if family is not None and isinstance(module, family.HyperMLPPreTrainedModel):
            configs[id(module.config)] = module.config
    for config in configs.values():
        config.extend_max_lag(max_lag)
    if holds_replacements(model):
        _note_hosts(model, max_lag)


def _note_hosts(model: nn.Module, max_lag: int) -> None:
    """Let ``config.max_position_embeddings`` of hosts follow, which tools cut texts by.

    Only where nothing else is bound to the old length: rotary angles, which every attention module has given up.
    """
    sites, left = find_sites(model)
    if left or not all(site.replaced is not None for site in sites):
        return
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    for config in configs.values():
        if getattr(config, "rope_parameters", None) and hasattr(config, "max_position_embeddings"):
            config.max_position_embeddings = max(config.max_position_embeddings, max_lag)
