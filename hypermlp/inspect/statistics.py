"""Numbers of a layer's maps, by head, by distance and by rank.

All take the :class:`~hypermlp.inspect.HeadMaps` of one layer and count what is visible alone: padding has no part in
them. What a layer does not have is None. A number of nothing, such as of a distance that no token sees, is NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hypermlp.checks import check_kind
from hypermlp.inspect.maps import HeadMaps
from hypermlp.ops import SequenceMix


class Reach(NamedTuple):
    """How far back heads read. Every token counts alike: its absolute weights are shares of their sum.

    Attributes:
        mean: ``[H]``, mean distance, in tokens.
        half: ``[H]``, the least distance within which half of the absolute weight lies.
        most: ``[H]``, that of 90 percent.
        by_distance: ``[H, T]``, the share of the absolute weight at each distance; sums to one.
    """

    mean: Tensor
    half: Tensor
    most: Tensor
    by_distance: Tensor


class NegativeShare(NamedTuple):
    """How much of the weights is negative, which softmax's cannot be.

    Attributes:
        by_number: ``[H]``, share of the visible weights that are below zero.
        by_weight: ``[H]``, their share of the sum of absolute weights.
    """

    by_number: Tensor
    by_weight: Tensor


class RankUse(NamedTuple):
    """How a mixing uses each rank.

    Attributes:
        read: ``[heads, R]``, mean square of ``z`` over the tokens: what the rank reads.
        added: ``[heads, R]``, mean square of ``core * z * up[lag]`` over all that is visible: what it adds to the map.
    """

    read: Tensor
    added: Tensor


class MixResponse(NamedTuple):
    """What a mixing does for a typical token, whose cores are the mean over the text.

    Attributes:
        diag: ``[heads, n]``, what each column is multiplied by: one (of the identity) and the diagonal.
        low_rank: ``[heads, n, n]``, ``down Diag(core) up^T``: entry ``[l, m]`` is what a one at column ``l`` adds at
            ``m``; None without a low-rank term.
    """

    diag: Tensor
    low_rank: Tensor | None

    @property
    def read(self) -> Tensor | None:
        """``[heads, n]``, the norm of what a one at each column adds anywhere."""
        return None if self.low_rank is None else self.low_rank.norm(dim=2)

    @property
    def written(self) -> Tensor | None:
        """``[heads, n]``, the norm of what ones anywhere add at each column."""
        return None if self.low_rank is None else self.low_rank.norm(dim=1)


def active_share(maps: HeadMaps) -> Tensor | None:
    """Share of what is visible that the selection leaves (``a > 0``), ``[H]``; None for softmax."""
    _check(maps)
    if maps.active is None:
        return None
    return (maps.active > 0).sum((0, 2, 3)) / maps.visible.sum()


def active_share_by_distance(maps: HeadMaps) -> Tensor | None:
    """The same of each distance apart, ``[H, T]``; None for softmax."""
    _check(maps)
    if maps.active is None:
        return None
    return _by_distance(maps, (maps.active > 0).to(maps.weights.dtype)) / _by_distance(
        maps, maps.visible.to(maps.weights.dtype)
    )


def reach(maps: HeadMaps) -> Reach:
    """How far back each head reads. Tokens early in the text cannot read far, and none reads beyond its start."""
    _check(maps)
    sizes = maps.weights.abs()
    total = sizes.sum(-1, keepdim=True)
    shares = torch.where(total > 0, sizes / total, 0)  # a row without any weight reads nothing
    by_distance = _by_distance(maps, shares)
    by_distance = by_distance / by_distance.sum(-1, keepdim=True)
    distance = torch.arange(by_distance.shape[-1], dtype=by_distance.dtype, device=by_distance.device)
    mean = (by_distance * distance).sum(-1)
    half, most = (_quantile(by_distance, share) for share in (0.5, 0.9))
    return Reach(mean, half, most, by_distance)


def negative_share(maps: HeadMaps) -> NegativeShare:
    """How much of each head's weights is negative."""
    _check(maps)
    sizes = maps.weights.abs()
    below = maps.weights < 0
    share = torch.where(below, sizes, 0).sum((0, 2, 3)) / sizes.sum((0, 2, 3))
    return NegativeShare(below.sum((0, 2, 3)) / maps.visible.sum(), share)


def rank_use(maps: HeadMaps) -> tuple[RankUse | None, RankUse | None]:
    """How the first mixing, ``heads = S*H``, and the second, ``heads = H``, use their ranks."""
    _check(maps)
    return _rank_use(maps, maps.z1, maps.routing_mix), _rank_use(maps, maps.z2, maps.readout_mix)


def mix_responses(maps: HeadMaps) -> tuple[MixResponse | None, MixResponse | None]:
    """What the first mixing, ``heads = S*H``, and the second, ``heads = H``, do for a typical token."""
    _check(maps)
    return _response(maps, maps.routing_mix), _response(maps, maps.readout_mix)


def _check(maps: HeadMaps) -> None:
    check_kind("maps", maps, HeadMaps, "head_maps(call), for a call of those that record(model, ...) gives")


def _by_distance(maps: HeadMaps, x: Tensor) -> Tensor:
    """Sums of ``[B, H, T, n]`` (or one head's) over all at each distance, ``[H, T]``."""
    length = maps.distance.shape[2]
    index = torch.where(maps.visible, maps.distance, 0).expand_as(x).transpose(0, 1).flatten(1)
    source = torch.where(maps.visible, x, 0).transpose(0, 1).flatten(1)
    return source.new_zeros(x.shape[1], length).scatter_add_(1, index, source)


def _quantile(shares: Tensor, share: float) -> Tensor:
    """The first place of ``[H, T]`` up to which ``share`` lies, ``[H]``; NaN where there are no shares."""
    place = (shares.cumsum(-1) < share).sum(-1).clamp_max(shares.shape[-1] - 1).to(shares.dtype)
    return torch.where(shares.isnan().any(-1), float("nan"), place)


@torch.no_grad()
def _rank_use(maps: HeadMaps, z: Tensor | None, mix: SequenceMix | None) -> RankUse | None:
    if z is None or mix is None or mix.up is None:
        return None
    used = z if mix.core is None else z * mix.core
    up = mix.up[:, : maps.visible.shape[-1]].to(z.dtype).square()
    # z is zero for padding, whatever its core
    added = torch.einsum("bihr,bic,hcr->hr", used.square(), maps.visible[:, 0].to(z.dtype), up)
    return RankUse(z.square().sum((0, 1)) / maps.valid.sum(), added / maps.visible.sum())


@torch.no_grad()
def _response(maps: HeadMaps, mix: SequenceMix | None) -> MixResponse | None:
    if mix is None:
        return None
    n, dtype = maps.visible.shape[-1], maps.weights.dtype
    table = mix.diag if mix.diag is not None else mix.down
    assert table is not None
    diag = torch.full((table.shape[0], n), float(mix.identity), dtype=dtype, device=table.device)
    if mix.diag is not None:
        diag = diag + mix.diag[:, :n].to(dtype)
    if mix.down is None or mix.up is None:
        return MixResponse(diag, None)
    down, up = mix.down[:, :n].to(dtype), mix.up[:, :n].to(dtype)
    if mix.core is not None:
        down = down * mix.core[maps.valid].mean(0)[:, None]
    return MixResponse(diag, down @ up.mT)
