"""Parameters and FLOPs of a described layer, and widths that make two of them equal in size.

Nothing is built: counts are closed forms of a :class:`~hypermlp.HyperConfig`. A comparison needs
them: at width 128 and 128 lags the default HyperGLU has 1.53 times softmax attention's
parameters (the sequence mixing's tables and cores do not shrink with the width).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

from hypermlp.config import HyperConfig, MixConfig
from hypermlp.ops.flops import forward_flops, visible_pairs

How = Literal["widen", "narrow"]


@dataclass(frozen=True)
class Count:
    """A number of parameters or FLOPs, by what they belong to.

    Attributes:
        projections: queries, keys, values, output.
        convolutions: on key and value inputs.
        gates: of queries, of the heads' output, and the cores of both sequence mixings.
        mixing: both sequence mixings without their cores.
        attention: scores and readout over all visible pairs (FLOPs only).
    """

    projections: int
    convolutions: int
    gates: int
    mixing: int
    attention: int = 0

    @property
    def total(self) -> int:
        return self.projections + self.convolutions + self.gates + self.mixing + self.attention


@dataclass(frozen=True)
class Match:
    """Two layers, or blocks, of nearly equal size; ``str()`` says in a sentence what was changed.

    Attributes:
        reference: the layer that sets the size.
        config: the layer that was fitted to it.
        reference_parameters: size of the first; of its block if ``intermediate_size`` is set.
        parameters: size of the second, likewise.
        change: what was changed.
        intermediate_size: inner width of the second block's SwiGLU, None where layers alone were matched.
    """

    reference: HyperConfig
    config: HyperConfig
    reference_parameters: int
    parameters: int
    change: str
    intermediate_size: int | None = None

    @property
    def relative_difference(self) -> float:
        """``parameters / reference_parameters - 1``."""
        return self.parameters / self.reference_parameters - 1

    def __str__(self) -> str:
        what = "layer" if self.intermediate_size is None else "block"
        return (
            f"{self.config.mixer} {what} with {self.change}: {self.parameters:,} parameters against "
            f"{self.reference_parameters:,} of {self.reference.mixer} ({100 * self.relative_difference:+.2f} %)"
        )


def count_parameters(config: HyperConfig) -> Count:
    """Parameters of the layer that ``config`` describes."""
    c = config
    projections = c.hidden_size * (2 * c.qk_dim + 2 * c.v_dim)
    if c.bias:
        projections += 2 * c.qk_dim + c.v_dim + c.hidden_size
    mixing = 0
    for mix, heads in _mixings(c):
        if mix.diag:
            mixing += heads * _table_rows(c)
        mixing += heads * mix.rank * 2 * _table_rows(c)
    return Count(
        projections=projections,
        convolutions=2 * c.hidden_size * c.conv_size,
        gates=(c.hidden_size + 1) * sum(c.gate_widths),
        mixing=mixing,
    )


def count_flops(config: HyperConfig, batch_size: int, length: int) -> Count:
    """FLOPs of one forward, two for each multiply-add.

    Counts the products over query-key pairs that may see each other, whatever path computes
    them: a causal layer's are half of the square that PyTorch's ``FlopCounterMode`` takes for
    ``scaled_dot_product_attention``. The convolutions are in, which that counter leaves out.
    Biases, activations, diagonals, rotation and the norm are left out of both.

    Args:
        config: of the layer.
        batch_size: sequences ``B``.
        length: tokens ``T`` of each.

    Raises:
        ValueError: if a size is not positive, or the length is over the table rows of a layer indexed by position.
    """
    c = config
    for name, value in (("batch_size", batch_size), ("length", length)):
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value}")
    if c.layout == "position" and c.mixer != "softmax" and c.max_lag is not None and length > c.max_lag:
        raise ValueError(f"length={length} is over max_lag={c.max_lag}, which the position layout does not allow")
    tokens = batch_size * length
    pairs = batch_size * visible_pairs(length, causal=c.causal, max_lag=c.max_lag)
    ranks = tuple(mix.rank if isinstance(mix, MixConfig) else 0 for mix in (c.routing_mix, c.readout_mix))

    def operator(routing_rank: int, readout_rank: int) -> int:
        ranks = (routing_rank, readout_rank)
        return forward_flops(pairs, num_heads=c.num_heads, num_maps=c.num_maps, qk=c.qk_width, v=c.v_width, ranks=ranks)

    attention = operator(0, 0)
    return Count(
        projections=2 * tokens * c.hidden_size * (2 * c.qk_dim + 2 * c.v_dim),
        convolutions=2 * tokens * 2 * c.hidden_size * c.conv_size,
        gates=2 * tokens * c.hidden_size * sum(c.gate_widths),
        mixing=operator(*ranks) - attention,
        attention=attention,
    )


def count_block_parameters(config: HyperConfig, intermediate_size: int) -> int:
    """Parameters of a pre-norm block: the layer, a SwiGLU without biases, and two RMSNorm weights."""
    hidden = config.hidden_size
    return count_parameters(config).total + 3 * hidden * intermediate_size + 2 * hidden


def match_parameters(
    reference: HyperConfig,
    other: HyperConfig,
    *,
    how: How,
    tolerance: float = 0.01,
    min_qk_width: int = 4,
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
    if how not in ("widen", "narrow"):
        raise ValueError(f"how must be 'widen' or 'narrow', got {how!r}")
    _check_positive(tolerance=tolerance, min_qk_width=min_qk_width)
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
    multiple_of: int = 1,
    tolerance: float = 0.01,
) -> Match:
    """The SwiGLU width that makes a block around ``other`` as large as one around ``reference``.

    Neither layer is changed: the smaller one gets the larger MLP. Blocks are those of
    :func:`count_block_parameters`.

    Args:
        reference: layer of the block that sets the size.
        other: layer of the block to fit.
        intermediate_size: inner width of the reference block's MLP.
        multiple_of: what the width must be a multiple of.
        tolerance: largest relative difference of the blocks.

    Returns:
        A :class:`Match` of the blocks, with the width as its ``intermediate_size``.

    Raises:
        ValueError: if no positive width is within the tolerance, naming the closest count.
    """
    _check_positive(intermediate_size=intermediate_size, multiple_of=multiple_of, tolerance=tolerance)
    target = count_block_parameters(reference, intermediate_size)
    wanted = (target - count_block_parameters(other, 0)) / (3 * other.hidden_size)
    width = multiple_of * max(1, round(wanted / multiple_of))
    count = count_block_parameters(other, width)
    change = f"intermediate_size {intermediate_size} -> {width}"
    match = Match(reference, other, target, count, change, width)
    if abs(match.relative_difference) > tolerance:
        raise ValueError(
            f"no intermediate_size, in multiples of {multiple_of}, brings a {other.mixer} block within "
            f"{100 * tolerance:g} % of {target:,} parameters: the closest is {count:,} "
            f"({100 * match.relative_difference:+.2f} %) with {width}; allow a larger tolerance or a larger reference"
        )
    return match


def _mixings(c: HyperConfig) -> list[tuple[MixConfig, int]]:
    """Each mixing the layer has, with the number of heads it works on."""
    mixes = ((c.routing_mix, c.num_maps * c.num_heads), (c.readout_mix, c.num_heads))
    return [(mix, heads) for mix, heads in mixes if isinstance(mix, MixConfig)]


def _table_rows(c: HyperConfig) -> int:
    return c.max_lag or 0


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
    highest = max((mix.rank for mix, _ in _mixings(c)), default=0)
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

    if not any(mix.rank > rank for mix, _ in _mixings(c)):
        return c
    return replace(c, mix_rank=rank, routing_mix=limited(c.routing_mix), readout_mix=limited(c.readout_mix))


def _describe(before: HyperConfig, after: HyperConfig) -> str:
    changed = [
        f"{name} {getattr(before, name)} -> {getattr(after, name)}"
        for name in ("qk_dim", "v_dim")
        if getattr(before, name) != getattr(after, name)
    ]
    ranks = [tuple(mix.rank for mix, _ in _mixings(c)) for c in (before, after)]
    if ranks[0] != ranks[1]:
        old, new = ("/".join(str(rank) for rank in dict.fromkeys(pair)) for pair in ranks)
        changed.append(f"mix_rank {old} -> {new}")
    return ", ".join(changed) or "nothing changed"


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value!r}")
