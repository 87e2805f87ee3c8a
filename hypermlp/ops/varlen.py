"""Who may see whom: padding masks and packed sequences.

This is the one home of visibility. Both paths rest on two facts stated here:

* a query sees one contiguous range of keys, its *span*, except for masked keys inside it;
* a padded token is as if it did not exist (``docs/mathematics.md``, property 5), so what it
  holds is replaced by zeros before anything reads it. Tokens before the first bound of packed
  sequences or from the last one on are padding too.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from hypermlp.ops.modes import values_readable
from hypermlp_kernels.arguments import Segment


class Tokens(NamedTuple):
    """Who is there. Made and checked once, at a door (:func:`hypermlp.ops.checks.tokens`), and passed on as one object.

    Attributes:
        valid: bool ``[B, T]``, True for a token that counts; None if all do.
        cu_seqlens: bounds of packed sequences, ``[N + 1]`` with ``B = 1``; None for one sequence a row.
    """

    valid: Tensor | None = None
    cu_seqlens: Tensor | None = None

    @property
    def one_sequence_a_row(self) -> bool:
        """Whether every row is one sequence, of which every token counts."""
        return self.valid is None and self.cu_seqlens is None

    def kept(self, length: int, device: torch.device) -> Tensor | None:
        """Which tokens are no padding, neither masked nor of no sequence, bool ``[B or 1, T]``; None: all."""
        inside = within_bounds(length, self.cu_seqlens, device)
        if inside is None or self.valid is None:
            return self.valid if inside is None else inside
        return self.valid & inside

    def zeroed(self, x: Tensor, past: int = 0) -> Tensor:
        """``x`` ``[B, T, ...]`` with zeros for every token that is padding: masked, or of no sequence.

        Of the first ``past`` tokens it has nothing.
        """
        kept = self.kept(past + x.shape[1], x.device)
        return zero_padded(x, kept[:, past:] if past and kept is not None else kept)

    def masked_zeroed(self, x: Tensor, past: int = 0) -> Tensor:
        """``x`` with zeros for masked tokens. What those of no sequence hold is read by none."""
        return zero_padded(x, self.valid[:, past:] if past and self.valid is not None else self.valid)


# every token counts: what most calls pass, made once
ALL_TOKENS = Tokens()


def zero_padded(x: Tensor, valid: Tensor | None) -> Tensor:
    """``x`` with the rows of padded tokens set to zero, whatever they held (NaN included).

    Args:
        x: ``[B, T, ...]``, or ``[B, ...]`` for T = 1.
        valid: bool ``[B, T]``, True for a token that counts; None keeps ``x`` as it is.
    """
    if valid is None:
        return x
    return torch.where(valid.reshape(valid.shape + (1,) * (x.ndim - valid.ndim)), x, x.new_zeros(()))


def newest(attention_mask: Tensor, new: int, before: int | None) -> Tensor:
    """Of a mask over ``new`` tokens, or over them and the ``before`` earlier ones, what it says of the new ones.

    Args:
        attention_mask: ``[B, new]`` or ``[B, before + new]``.
        new: tokens that come now.
        before: tokens that came before; None where the number cannot be read.
    """
    columns = attention_mask.shape[1]
    if columns != new and before is not None and columns != before + new:
        raise ValueError(f"attention_mask must count the {new} new tokens or all {before + new}, got {columns}")
    return attention_mask[:, columns - new :]


def within_bounds(length: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor | None:
    """Which positions belong to a sequence, bool ``[1, T]``; the others are padding. None without bounds.

    Nothing is read on the host, so that bounds on a device, or in a compiled graph, mean what they mean in eager mode.
    """
    if cu_seqlens is None:
        return None
    bounds = cu_seqlens.to(device=device, dtype=torch.long)
    positions = torch.arange(length, device=device)
    return ((positions >= bounds[0]) & (positions < bounds[-1]))[None]


def sequence_starts(length: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """First position of the sequence each position belongs to, ``[T]`` int64; ``T`` where it belongs to none."""
    if cu_seqlens is None:
        return torch.zeros(length, dtype=torch.long, device=device)
    bounds, after, inside = _bounds_around(length, cu_seqlens, device)
    return torch.where(inside, bounds[(after - 1).clamp_min(0)], length)


def sequence_stops(length: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """One past the last position of the sequence each position belongs to, ``[T]`` int64; 0 where it has none."""
    if cu_seqlens is None:
        return torch.full((length,), length, dtype=torch.long, device=device)
    bounds, after, inside = _bounds_around(length, cu_seqlens, device)
    return torch.where(inside, bounds[after.clamp_max(bounds.shape[0] - 1)], 0)


def _bounds_around(length: int, cu_seqlens: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The bounds ``[N + 1]`` and, for each position, which of them is the first after it, and if a sequence has it."""
    bounds = cu_seqlens.to(device=device, dtype=torch.long)
    after = torch.searchsorted(bounds, torch.arange(length, device=device), right=True)
    return bounds, after, (after > 0) & (after < bounds.shape[0])


def key_spans(
    length: int,
    *,
    causal: bool,
    max_lag: int | None,
    cu_seqlens: Tensor | None,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """The half-open range of keys each query sees: ``(start, stop)``, each ``[T]`` int64.

    That of a token outside all packed sequences is empty: its start lies at ``T``.

    Args:
        length: number of tokens ``T``.
        causal: whether keys after the query are hidden.
        max_lag: number of lags a query reaches back over, itself included; None for all.
        cu_seqlens: bounds of packed sequences, ``[N + 1]``, or None.
        device: where to make the result.
    """
    start = sequence_starts(length, cu_seqlens, device)
    if not causal:
        return start, sequence_stops(length, cu_seqlens, device)
    positions = torch.arange(length, device=device)
    if max_lag is not None:
        start = torch.maximum(start, positions - (max_lag - 1))
    return start, positions + 1


def sequence_origins(tokens: Tokens, batch: int, length: int, device: torch.device) -> Tensor:
    """First *valid* position of the sequence each position belongs to, ``[B, T]`` int64.

    Position-indexed parameters count from here, so that left padding shifts nothing. A
    sequence with no valid token keeps its own start.
    """
    positions = torch.arange(length, device=device).expand(batch, length)
    start = sequence_starts(length, tokens.cu_seqlens, device).expand(batch, length)
    inside = start < length
    start = torch.where(inside, start, positions)  # a token of no sequence is one of its own
    if tokens.valid is None:
        return start
    candidate = torch.where(tokens.valid & inside, positions, length)
    first = torch.full((batch, length), length, dtype=torch.long, device=device)
    first = first.scatter_reduce(1, start, candidate, reduce="amin")
    origin = first.gather(1, start)
    return torch.where(origin == length, start, origin)


def segments(tokens: Tokens, batch: int, length: int) -> list[Segment]:
    """Sequences to compute, padding at either end trimmed, equal neighbours in the batch joined.

    Reads the values of its arguments, so it waits for the device that holds them.
    """
    bounds = [0, length] if tokens.cu_seqlens is None else tokens.cu_seqlens.tolist()
    spans = list(pairwise(bounds))
    if tokens.valid is None:
        return [Segment(0, batch, lo, hi, False) for lo, hi in spans if hi > lo]
    found: list[Segment] = []
    for row, valid in enumerate(tokens.valid.cpu()):
        for lo, hi in spans:
            kept = torch.nonzero(valid[lo:hi]).flatten()
            if kept.numel() == 0:
                continue
            first, last = lo + int(kept[0]), lo + int(kept[-1])
            holes = last - first + 1 != kept.numel()
            previous = found[-1] if found else None
            if previous and previous.batch_stop == row and previous[2:] == (first, last + 1, False) and not holes:
                found[-1] = previous._replace(batch_stop=row + 1)
            else:
                found.append(Segment(row, row + 1, first, last + 1, holes))
    return found


def longest_row(tokens: Tokens, length: int) -> int:
    """Tokens of the longest row that :func:`unpacked` makes of ``length``."""
    bounds = tokens.cu_seqlens
    if bounds is None or not values_readable(bounds, wait=True):
        return length
    return int(bounds.diff().max())


def unpacked(k: Tensor, v: Tensor, x: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Packed sequences ``[1, T, ...]`` as rows ``[N, longest, ...]``, padded with zeros on the left; which are valid.

    Where bounds cannot be read, any sequence may be the longest: rows are of ``T`` tokens then. Rows stay as they are.
    """
    valid, cu_seqlens = tokens
    if cu_seqlens is None:
        return k, v, x, valid
    start, stop, longest = cu_seqlens[:-1].long(), cu_seqlens[1:].long(), longest_row(tokens, k.shape[1])
    token = stop[:, None] - longest + torch.arange(longest, device=stop.device)
    inside = token >= start[:, None]
    token = token.clamp_min(0)
    k, v, x = (zero_padded(part[0, token], inside) for part in (k, v, x))
    return k, v, x, inside if valid is None else inside & valid[0, token]
