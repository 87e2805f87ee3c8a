"""Widths that make two layers, or the blocks around them, equal in size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

from hypermlp.budget.counts import count_block_flops, count_block_parameters, count_parameters, described, mixings
from hypermlp.checks import as_integer, as_number, as_sizes
from hypermlp.config import HyperConfig, MixConfig

How = Literal["widen", "narrow"]
Unit = Literal["parameters", "FLOPs"]


@dataclass(frozen=True)
class Match:
    """Two layers, or blocks, of nearly equal size; ``str()`` says in a sentence what was changed.

    Attributes:
        reference: the layer that sets the size.
        config: the layer that was fitted to it.
        reference_count: parameters or FLOPs of the first; of its block if ``intermediate_size`` is set.
        count: of the second, likewise.
        change: what was changed.
        intermediate_size: inner width of the second block's SwiGLU, None where layers alone were matched.
        unit: what was counted.
    """

    reference: HyperConfig
    config: HyperConfig
    reference_count: int
    count: int
    change: str
    intermediate_size: int | None = None
    unit: Unit = "parameters"

    @property
    def relative_difference(self) -> float:
        """``count / reference_count - 1``."""
        return self.count / self.reference_count - 1

    def __str__(self) -> str:
        what = "layer" if self.intermediate_size is None else "block"
        return (
            f"{self.config.mixer} {what} with {self.change}: {self.count:,} {self.unit} against "
            f"{self.reference_count:,} of {self.reference.mixer} ({100 * self.relative_difference:+.2f} %)"
        )


def match_parameters(
    reference: HyperConfig, other: HyperConfig, *, how: How, tolerance: float = 0.01, min_qk_width: int = 4
) -> Match:
    """``other`` with its widths changed until it has as many parameters as ``reference``.

    Args:
        reference: the layer that sets the size; not changed.
        other: the layer to fit.
        how: ``"widen"`` enlarges the inner width: ``qk_dim`` and ``v_dim`` together, in their
            present proportion. ``"narrow"`` takes from ``qk_dim`` first, as the paper does, and only
            where that is not enough from the rank of the sequence mixings, as little as possible.
        tolerance: largest relative difference.
        min_qk_width: narrowest score map that narrowing may leave.

    Returns:
        The closest of the allowed widths, unchanged if ``other`` fits as it is.

    Raises:
        ValueError: if nothing within the tolerance exists, naming the closest count.
    """
    described(reference, "reference")
    described(other, "other")
    if how not in ("widen", "narrow"):
        raise ValueError(f"how must be 'widen' or 'narrow', got {how!r}")
    tolerance = as_number("tolerance", tolerance)
    min_qk_width = as_integer("min_qk_width", min_qk_width, 1)
    target = count_parameters(reference).total
    if abs(count_parameters(other).total - target) <= tolerance * target:
        chosen = other
    elif how == "widen":
        chosen = _closest(_wider(other, target), target)
    else:
        chosen = _narrowest_change(other, target, tolerance, min_qk_width)
    count = count_parameters(chosen).total
    match = Match(reference, chosen, target, count, _describe(other, chosen))
    if abs(match.relative_difference) > tolerance:
        advice = "narrow" if how == "widen" else "widen"
        raise ValueError(
            f"no width of {other.mixer} is within {100 * tolerance:g} % of {target:,} parameters by how={how!r}: the "
            f"closest is {count:,} ({100 * match.relative_difference:+.2f} %) with {match.change}; "
            f"allow a larger tolerance, try how={advice!r}, or match_intermediate_size"
        )
    return match


def match_intermediate_size(
    reference: HyperConfig,
    other: HyperConfig,
    intermediate_size: int,
    *,
    flops_at: int | None = None,
    multiple_of: int = 1,
    tolerance: float = 0.01,
) -> Match:
    """The SwiGLU width that makes a block around ``other`` as large, or as dear, as one around ``reference``.

    Neither layer is changed: the smaller one gets the larger MLP. Blocks are those of
    :func:`count_block_parameters`. Equal parameters are not equal work: where a block has long tables, parameters
    that cost few FLOPs, the other one's wider MLP makes it dearer.

    Args:
        reference: layer of the block that sets the size.
        other: layer of the block to fit.
        intermediate_size: inner width of the reference block's MLP.
        flops_at: match the FLOPs of one forward over a sequence of that many tokens
            (:func:`count_block_flops`). None: match parameters.
        multiple_of: what the width must be a multiple of.
        tolerance: largest relative difference of the blocks.

    Returns:
        A :class:`Match` of the blocks, with the width as its ``intermediate_size``.

    Raises:
        ValueError: if no positive width is within the tolerance, naming the closest count.
    """
    described(reference, "reference")
    described(other, "other")
    intermediate_size, multiple_of = as_sizes(intermediate_size=intermediate_size, multiple_of=multiple_of)
    tolerance = as_number("tolerance", tolerance)
    if flops_at is not None:
        flops_at = as_integer("flops_at", flops_at, 1, "a number of tokens")
    unit: Unit = "parameters" if flops_at is None else "FLOPs"

    def count(config: HyperConfig, width: int) -> int:
        if flops_at is None:
            return count_block_parameters(config, width)
        return count_block_flops(config, width, 1, flops_at)

    target, rest = count(reference, intermediate_size), count(other, 0)
    wanted = (target - rest) / (count(other, 1) - rest)
    width = multiple_of * max(1, round(wanted / multiple_of))
    change = f"intermediate_size {intermediate_size} -> {width}"
    match = Match(reference, other, target, count(other, width), change, width, unit)
    if abs(match.relative_difference) > tolerance:
        raise ValueError(
            f"no intermediate_size, in multiples of {multiple_of}, brings a {other.mixer} block within "
            f"{100 * tolerance:g} % of {target:,} {unit}: the closest is {match.count:,} "
            f"({100 * match.relative_difference:+.2f} %) with {width}; allow a larger tolerance or a larger reference"
        )
    return match


def _qk_step(c: HyperConfig) -> int:
    return c.num_maps * c.num_heads * (2 if c.rope else 1)


def _closest(configs: list[HyperConfig], target: int) -> HyperConfig:
    return min(configs, key=lambda c: abs(count_parameters(c).total - target))


def _wider(c: HyperConfig, target: int) -> list[HyperConfig]:
    """``c`` and ever wider ones, up to the first that is larger than ``target``."""
    configs, v_dim, step = [c], c.v_dim, _qk_step(c)
    while count_parameters(configs[-1]).total < target:
        v_dim += c.num_heads
        qk_dim = max(c.qk_dim, step * round(v_dim * c.qk_dim / c.v_dim / step))
        configs.append(replace(c, qk_dim=qk_dim, v_dim=v_dim))
    return configs


def _narrowest_change(c: HyperConfig, target: int, tolerance: float, min_qk_width: int) -> HyperConfig:
    """The least reduced rank at which some ``qk_dim`` fits, and the ``qk_dim`` closest to the target there."""
    step = _qk_step(c)
    least = min(c.qk_dim, step * ceil(min_qk_width * c.num_maps * c.num_heads / step))
    highest = max((mix.rank for mix, _ in mixings(c)), default=0)
    tried = []
    for rank in range(highest, 0, -1) if highest else (0,):
        at_rank = _with_rank_at_most(c, rank)
        best = _closest([replace(at_rank, qk_dim=qk) for qk in range(least, c.qk_dim + 1, step)], target)
        tried.append(best)
        if abs(count_parameters(best).total - target) <= tolerance * target:
            return best
    return _closest(tried, target)


def _with_rank_at_most(c: HyperConfig, rank: int) -> HyperConfig:
    def limited(mix: MixConfig | bool) -> MixConfig | bool:
        return replace(mix, rank=min(mix.rank, rank)) if isinstance(mix, MixConfig) else mix

    if not any(mix.rank > rank for mix, _ in mixings(c)):
        return c
    return replace(c, mix_rank=rank, routing_mix=limited(c.routing_mix), readout_mix=limited(c.readout_mix))


def _describe(before: HyperConfig, after: HyperConfig) -> str:
    changed = [
        f"{name} {getattr(before, name)} -> {getattr(after, name)}"
        for name in ("qk_dim", "v_dim")
        if getattr(before, name) != getattr(after, name)
    ]
    ranks = [tuple(mix.rank for mix, _ in mixings(c)) for c in (before, after)]
    if ranks[0] != ranks[1]:
        old, new = ("/".join(str(rank) for rank in dict.fromkeys(pair)) for pair in ranks)
        changed.append(f"mix_rank {old} -> {new}")
    return ", ".join(changed) or "nothing changed"
