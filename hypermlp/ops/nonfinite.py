"""Numbers that are not finite: a row that sees one is NaN, and no other row knows of it.

A matrix product multiplies hidden keys by a zero weight, and zero times NaN is NaN. A path therefore
multiplies finite numbers alone, and marks its rows from the inputs. A marked row passes no gradient back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hypermlp.ops.mixing import SequenceMix

# the first key that each query sees and one past its last, see hypermlp.ops.varlen.key_spans
Spans = Callable[[], tuple[Tensor, Tensor]]


def finite(x: Tensor) -> Tensor:
    """``x`` with zeros in place of NaN and infinities."""
    return torch.where(torch.isfinite(x), x, 0)


def finite_gate(mix: SequenceMix) -> SequenceMix:
    """``mix`` with a finite gate."""
    return mix if mix.gate is None else mix._replace(gate=finite(mix.gate))


class Finite(NamedTuple):
    """The operator's streams with zeros in place of NaN and infinities, and the rows that saw one.

    ``marked`` is bool ``[B, m, H]``; None: there are none, and the streams are as they came.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    routing_mix: SequenceMix
    readout_mix: SequenceMix
    marked: Tensor | None


def without_nonfinite(
    q: Tensor, k: Tensor, v: Tensor, routing_mix: SequenceMix, readout_mix: SequenceMix, spans: Spans
) -> Finite:
    """Streams ``[B, T, heads, width]`` for products, which read their values; ``spans()`` only where it must be."""
    gates = routing_mix.gate, readout_mix.gate
    # a sum that overflows is looked at again, and found finite
    sums = torch.stack([x.sum() for x in (q, k, v, *gates) if x is not None])
    if bool(torch.isfinite(sums).all()):
        return Finite(q, k, v, routing_mix, readout_mix, None)
    streams, marked = made_finite(q, k, v, routing_mix, readout_mix, spans)
    return Finite(*streams, marked)


def made_finite(
    q: Tensor, k: Tensor, v: Tensor, routing_mix: SequenceMix, readout_mix: SequenceMix, spans: Spans
) -> tuple[tuple[Tensor, Tensor, Tensor, SequenceMix, SequenceMix], Tensor]:
    """The streams with zeros in place of NaN and infinities, and the rows that see one, bool ``[B, m, H]``."""
    marked = rows_that_see_nonfinite(q, k, v, (routing_mix.gate, readout_mix.gate), *spans())
    return (finite(q), finite(k), finite(v), finite_gate(routing_mix), finite_gate(readout_mix)), marked


def rows_that_see_nonfinite(
    q: Tensor, k: Tensor, v: Tensor, gates: tuple[Tensor | None, Tensor | None], start: Tensor, stop: Tensor
) -> Tensor:
    """Which rows of which heads see a number that is not finite, bool ``[B, m, H]``.

    Args:
        q: ``[B, m, S*H, K]``, the last ``m`` tokens' queries.
        k: ``[B, T, S*H, K]``, ``v`` ``[B, T, H, V]``; zero at padded tokens.
        gates: of both mixings, ``[B, m, heads, R]`` or None.
        start: ``[T]`` first key of each query's span; ``stop`` one past its last.
    """
    heads, queries = v.shape[2], q.shape[1]
    held = _held(k, heads) | _held(v, heads)
    counts = torch.cumsum(held.to(torch.int32), dim=1)
    counts = torch.cat((torch.zeros_like(counts[:, :1]), counts), dim=1)
    first = start.shape[0] - queries
    seen = counts[:, stop[first:]] > counts[:, start[first:]]
    for own in (q, *gates):
        if own is not None:
            seen = seen | _held(own, heads)
    return seen


def _held(x: Tensor, heads: int) -> Tensor:
    """Whether ``x`` ``[B, n, maps, width]`` has one in any map of each head, ``[B, n, heads]``."""
    bad = (~torch.isfinite(x)).any(-1)
    return bad.reshape(*bad.shape[:2], bad.shape[2] // heads, heads).any(2)
