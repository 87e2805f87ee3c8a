"""What ``swap_attention`` did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from hypermlp.layers import AttentionLayer


class Swapped(NamedTuple):
    """A replaced module: where, what it was, and the layer that stands there now."""

    name: str
    was: str
    layer: AttentionLayer


class Left(NamedTuple):
    """A module left as it is, and why."""

    name: str
    was: str
    reason: str


@dataclass(frozen=True)
class SwapReport:
    """What :func:`swap_attention` did; ``print`` it.

    Attributes:
        swapped: replaced modules, in the model's order.
        left: attention modules left as they are, each with the reason.
        parameters_before: numbers in the model's parameters before, shared ones once.
        parameters_after: and after.
        hooks_left: modules that were replaced, or were in one, with hooks that are not called until
            :func:`restore_attention`. Hooks on the calls of a replaced module itself go on.
    """

    swapped: tuple[Swapped, ...]
    left: tuple[Left, ...]
    parameters_before: int
    parameters_after: int
    hooks_left: tuple[Left, ...] = ()

    def __str__(self) -> str:
        change = self.parameters_after / max(1, self.parameters_before) - 1
        lines = [
            f"{len(self.swapped)} attention modules swapped, {len(self.left)} left; parameters "
            f"{self.parameters_before:,} -> {self.parameters_after:,} ({change:+.1%})"
        ]
        lines += [f"  {s.name}: {s.was} -> {type(s.layer).__name__}({s.layer.extra_repr()})" for s in self.swapped]
        lines += [f"  {left.name}: {left.was} left, {left.reason}" for left in self.left]
        lines += [f"  {left.name}: {left.was} had {left.reason}, not called now" for left in self.hooks_left]
        return "\n".join(lines)
