"""Numbers that are not finite: a row that sees one is NaN, and no other row knows of it.

A matrix product multiplies hidden keys by a zero weight, and zero times NaN is NaN. A path therefore
multiplies finite numbers alone, and marks its rows from the inputs. A marked row passes no gradient back.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from hypermlp.ops.arguments import OperatorArgs


def finite(x: Tensor) -> Tensor:
    """``x`` with zeros in place of NaN and infinities."""
    return torch.where(torch.isfinite(x), x, 0)


def without_nonfinite(x: OperatorArgs) -> tuple[OperatorArgs, Tensor | None]:
    """``x`` with finite streams, whose values are read, and the rows that saw another number, bool ``[B, m, H]``.

    None: there are none, and ``x`` is as it came.
    """
    streams = x.q, x.k, x.v, x.routing_mix.core, x.readout_mix.core
    # a sum that overflows is looked at again, and found finite
    sums = torch.stack([stream.sum() for stream in streams if stream is not None])
    if bool(torch.isfinite(sums).all()):
        return x, None
    return made_finite(x)


def made_finite(x: OperatorArgs) -> tuple[OperatorArgs, Tensor]:
    """``x`` with zeros in place of NaN and infinities, and the rows that see one, bool ``[B, m, H]``."""
    return x.map_streams(finite), rows_that_see_nonfinite(x, *x.spans())


def rows_that_see_nonfinite(x: OperatorArgs, start: Tensor, stop: Tensor) -> Tensor:
    """Which rows of which heads see a number that is not finite, bool ``[B, m, H]``.

    Args:
        x: queries and cores of the last ``m`` tokens; keys and values are zero at padded tokens.
        start: ``[T]`` first key of each query's span; ``stop`` one past its last.
    """
    heads = x.v.shape[2]
    held = _held(x.k, heads) | _held(x.v, heads)
    counts = torch.cumsum(held.to(torch.int32), dim=1)
    counts = torch.cat((torch.zeros_like(counts[:, :1]), counts), dim=1)
    seen = counts[:, stop[x.past :]] > counts[:, start[x.past :]]
    for own in (x.q, x.routing_mix.core, x.readout_mix.core):
        if own is not None:
            seen = seen | _held(own, heads)
    # a token of no sequence is padding, whatever it holds
    return seen & (start < stop)[x.past :, None]


def _held(x: Tensor, heads: int) -> Tensor:
    """Whether ``x`` ``[B, n, maps, width]`` has one in any map of each head, ``[B, n, heads]``."""
    bad = (~torch.isfinite(x)).any(-1)
    return rearrange(bad, "b n (s h) -> b n s h", h=heads).any(2)
