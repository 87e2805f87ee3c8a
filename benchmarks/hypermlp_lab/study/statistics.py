"""Means and differences over seeds, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import nan
from typing import Literal

import numpy as np

Verdict = Literal["agrees", "disagrees", "not decided at this size", "no data"]
LEVEL = 0.95
# values that say anything
FEWEST = 3
# all resamples of so few values are enumerated, so that an interval is no matter of luck
_ENUMERATED, _DRAWS = 6, 20_000


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: of the values.
        low, high: 95 % bootstrap interval of the mean, by percentiles; nan of a single value.
        t_low, t_high: 95 % interval by Student's t.
        count: values.
    """

    mean: float
    low: float
    high: float
    t_low: float
    t_high: float
    count: int

    @property
    def sign(self) -> int:
        """1 or -1 where both intervals lie on one side of zero, else 0; 0 of fewer than three values.

        Both, as a bootstrap of three to five values gives intervals that are too short: it never reaches beyond
        the smallest and the largest of them.
        """
        low, high = self.widest
        if self.count < FEWEST:
            return 0
        return 1 if low > 0 else -1 if high < 0 else 0

    @property
    def widest(self) -> tuple[float, float]:
        """What both intervals lie in."""
        return min(self.low, self.t_low), max(self.high, self.t_high)


def estimate(values: Sequence[float]) -> Estimate | None:
    """The mean of ``values`` and its intervals; None if there are none."""
    if not values:
        return None
    from scipy.stats import t

    x = np.asarray(values, dtype=np.float64)
    mean, count = float(x.mean()), len(x)
    if count == 1:
        return Estimate(mean, nan, nan, nan, nan, count)
    low, high = bootstrap(x)
    half = float(t.ppf((1 + LEVEL) / 2, count - 1) * x.std(ddof=1) / count**0.5)
    return Estimate(mean, low, high, mean - half, mean + half, count)


def bootstrap(x: np.ndarray) -> tuple[float, float]:
    """Percentile interval of the mean of resamples of ``x``: of all of them, or of many for more than a few values."""
    count = len(x)
    if count <= _ENUMERATED:
        rows = np.array(list(product(range(count), repeat=count)))
    else:
        rows = np.random.default_rng(0).integers(0, count, (_DRAWS, count))
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(x[rows].mean(1), [tail, 100 - tail])
    return float(low), float(high)


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Estimate | None:
    """The difference ``first - second``, seed by seed; None if no seed is in both."""
    return estimate([first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())])


def verdict(difference: Estimate | None) -> Verdict:
    """On the claim that ``difference`` is above zero."""
    if difference is None:
        return "no data"
    return {1: "agrees", -1: "disagrees", 0: "not decided at this size"}[difference.sign]  # type: ignore[return-value]


def verdict_on_level(difference: Estimate | None, margin: float) -> Verdict:
    """On the claim that ``difference`` is between ``-margin`` and ``margin``."""
    if difference is None:
        return "no data"
    low, high = difference.widest
    if difference.count < FEWEST:
        return "not decided at this size"
    if -margin < low and high < margin:
        return "agrees"
    return "disagrees" if low > margin or high < -margin else "not decided at this size"
