"""What ``swap_attention`` did."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from hypermlp.layers import AttentionLayer


class Swapped(NamedTuple):
    """A replaced module.

    Attributes:
        name: where.
        was: what it was.
        layer: that stands there now.
        gone: which of its parameters go.
        notes: what it did that the layer does not, or does otherwise, in words.
    """

    name: str
    was: str
    layer: AttentionLayer
    gone: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


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
        gone = Counter((s.was, f"its parameters {', '.join(s.gone)} go") for s in self.swapped if s.gone)
        notes = Counter((s.was, note) for s in self.swapped for note in s.notes)
        lines += [f"  {count} x {was}: {what}" for (was, what), count in (gone | notes).items()]
        lines += [f"  warning: {warning}" for warning in self.warnings]
        lines += [f"  {left.name}: {left.was} left, {left.reason}" for left in self.left]
        lines += [f"  {left.name}: {left.was} had {left.reason}, not called now" for left in self.hooks_left]
        return "\n".join(lines)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is likely not meant: tables larger than all projections beside them."""
        found = []
        for (rows, tables, projections), count in Counter(_sizes(s.layer) for s in self.swapped).items():
            if tables > projections:
                found.append(
                    f"in {count} layers the tables of {rows:,} rows have {tables:,} parameters, the projections "
                    f"{projections:,}: pass max_lag=the longest sequence you use, or a smaller mix_rank"
                )
        return tuple(found)


def _sizes(layer: AttentionLayer) -> tuple[int, int, int]:
    """Rows of a layer's tables, and parameters in them and in its projections."""
    mixes = [mix for mix in (getattr(layer, "routing_mix", None), getattr(layer, "readout_mix", None)) if mix]
    projections = (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj)
    tables, linear = (sum(p.numel() for part in parts for p in part.parameters()) for parts in (mixes, projections))
    return layer.config.max_lag or 0, tables, linear
