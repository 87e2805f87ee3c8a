"""Which of many combinations run every time; the others are slow."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import pytest


def combinations(*axes: Iterable[Any], quick: Callable[..., bool]) -> list[Any]:
    """All combinations, for one ``pytest.mark.parametrize`` of as many names; slow are those that are not ``quick``."""
    return [pytest.param(*chosen, marks=[pytest.mark.slow] * (not quick(*chosen))) for chosen in product(*axes)]


def some(values: Iterable[Any], quick: Iterable[Any]) -> list[Any]:
    """All values of one parameter; slow are those that are not ``quick``."""
    values, chosen = list(values), list(quick)
    assert all(x in values for x in chosen), "a quick case that does not exist"
    return [pytest.param(x, marks=[pytest.mark.slow] * (x not in chosen)) for x in values]
