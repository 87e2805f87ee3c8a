"""What a page shows of one attention layer over one text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hypermlp import inspect
from hypermlp.inspect import LayerCall, MixResponse, NegativeShare, RankUse, Reach
from hypermlp_lab.page import Table

_NONE = "-"


@dataclass(frozen=True)
class LayerView:
    """Numbers of one layer, of a batch of one; what it does not have is None.

    Attributes:
        name: in the model.
        mixer: as in its config.
        maps: names of its score maps; those of a head's gate first.
        heads: names of its heads.
        by_lag: whether columns are lags, else positions.
        weights: ``[H, T, n]``, NaN where nothing is seen.
        active, active_by_distance, reach, negative, ranks, responses: see :mod:`hypermlp.inspect`.
        even: the reach of a head whose weights are all alike.
    """

    name: str
    mixer: str
    maps: list[str]
    heads: list[str]
    by_lag: bool
    weights: Tensor
    active: Tensor | None
    active_by_distance: Tensor | None
    reach: Reach
    even: Reach
    negative: NegativeShare
    ranks: tuple[RankUse | None, RankUse | None]
    responses: tuple[MixResponse | None, MixResponse | None]


def view(call: LayerCall) -> LayerView:
    """The numbers of a call; its maps are let go."""
    maps, config = inspect.head_maps(call), call.layer.config
    heads = [f"head {head}" for head in range(config.num_heads)]
    kinds = ("gate", "scale") if config.num_maps == 2 else ("scores",)
    return LayerView(
        name=call.name,
        mixer=config.mixer,
        maps=[f"{kind}, {head}" for kind in kinds for head in heads],
        heads=heads,
        by_lag=config.layout == "lag",
        weights=torch.where(maps.visible, maps.weights, float("nan"))[0],
        active=inspect.active_share(maps),
        active_by_distance=inspect.active_share_by_distance(maps),
        reach=inspect.reach(maps),
        even=inspect.reach(maps._replace(weights=maps.visible.to(maps.weights.dtype))),
        negative=inspect.negative_share(maps),
        ranks=inspect.rank_use(maps),
        responses=inspect.mix_responses(maps),
    )


def heads_table(views: list[LayerView]) -> Table:
    """A row for every head of every layer."""
    rows = []
    for layer in views:
        for head, name in enumerate(layer.heads):
            active = _NONE if layer.active is None else _percent(layer.active[head])
            distances = [f"{float(x[head]):.1f}" for x in (layer.reach.mean, layer.even.mean.expand(len(layer.heads)))]
            within = [_count(x[head]) for x in (layer.reach.half, layer.reach.most)]
            negative = [_percent(x[head]) for x in layer.negative]
            rows.append([layer.name, name, active, *distances, *within, *negative])
    headings = [
        "layer", "head", "active lags", "mean lag", "if all alike", "50 % within", "90 % within",
        "negative weights", "of the weight",
    ]  # fmt: skip
    caption = (
        "Every head over this text. Active: the share of the visible lags that the selection leaves (softmax: all). "
        "Mean lag: how far back the absolute weight lies, every token counting alike, and what it would be if all that "
        "is visible weighed the same; then the lags within which 50 and 90 % of it lie. Negative: the share of the "
        "weights below zero, and their share of the absolute weight."
    )
    return Table(caption, headings, rows)


def _percent(share: Tensor) -> str:
    return f"{100 * float(share):.1f} %"


def _count(tokens: Tensor) -> str:
    return _NONE if bool(tokens.isnan()) else str(int(tokens))
