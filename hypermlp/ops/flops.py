"""Floating-point operations of the operator, counted from shapes (two per multiply-add)."""

from __future__ import annotations


def visible_pairs(length: int, *, causal: bool = True, max_lag: int | None = None, past: int = 0) -> int:
    """Query-key pairs in one sequence of ``length`` tokens, seen over the last ``max_lag`` or all.

    The first ``past`` tokens have no query.
    """
    if not causal:
        return (length - past) * length
    if past:
        return visible_pairs(length, max_lag=max_lag) - visible_pairs(past, max_lag=max_lag)
    window = length if max_lag is None else min(length, max_lag)
    return window * (window + 1) // 2 + (length - window) * window


def forward_flops(pairs: int, *, num_heads: int, num_maps: int, qk: int, v: int, ranks: tuple[int, int]) -> int:
    """Matrix products of one forward over ``pairs``.

    Args:
        pairs: see :func:`visible_pairs`, summed over the batch.
        num_heads: heads ``H``; ``num_maps`` is ``S``, score maps a head.
        qk: score width ``K`` of a map; ``v``: value width of a head.
        ranks: of the first and second mixing, 0 where it has no low-rank term.
    """
    routing = num_maps * (2 * qk + 4 * ranks[0])
    return pairs * num_heads * (routing + 4 * ranks[1] + 2 * v)


def backward_flops(pairs: int, *, num_heads: int, num_maps: int, qk: int, v: int, ranks: tuple[int, int]) -> int:
    """Matrix products of one backward that recomputes its maps from saved statistics."""
    recomputed = num_maps * (2 * qk + 2 * ranks[0]) + 2 * ranks[1]
    gradients = num_maps * (4 * qk + 8 * ranks[0]) + 8 * ranks[1] + 4 * v
    return pairs * num_heads * (recomputed + gradients)
