"""Which elements of a tile in column order its rows see, and zeros in place of the others."""

import triton
import triton.language as tl


@triton.jit
def has_hidden(
    i0, t, n, max_lag, BY_LAG: tl.constexpr, CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Whether the tile may have an element that its row does not see (masked tokens aside)."""
    if BY_LAG:
        # the last row's window opens last; a group above the diagonal has negative lags
        first_key = tl.maximum(i0 + BM - max_lag, 0)
        hidden = (t * BN < first_key + BN - 1) | (t * BN > i0)
    else:
        hidden = t * BN + BN > n
        if CAUSAL:
            hidden = hidden | (t * BN + BN - 1 > i0)
    return hidden


@triton.jit
def visible(
    i0, t, n, max_lag, p_valid,
    BY_LAG: tl.constexpr, CAUSAL: tl.constexpr, HOLES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Which elements of a tile in column order their rows see, ``[BM, BN]``."""
    o_m = tl.arange(0, BM)
    o_i = (i0 + o_m)[:, None]
    o_c = tl.arange(0, BN)[None, :]
    if BY_LAG:
        o_lag = (i0 - t * BN) + (o_m // BN * BN)[:, None] + o_c
        o_j = o_i - o_lag
        seen = (o_lag >= 0) & (o_lag < tl.minimum(o_i + 1, max_lag))
    else:
        o_j = t * BN + o_c
        seen = (o_j < n) & (o_i >= 0)
        if CAUSAL:
            seen = seen & (o_j <= o_i)
    if HOLES:
        seen = seen & (tl.load(p_valid + o_j, mask=seen & (o_j < n), other=0) != 0)
    return seen


@triton.jit
def hide(
    b_x, i0, t, n, max_lag, p_valid,
    BY_LAG: tl.constexpr, CAUSAL: tl.constexpr, HOLES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``x`` in column order with zeros, whatever it held, where the row does not see the column."""
    if HOLES:
        b_x = tl.where(visible(i0, t, n, max_lag, p_valid, BY_LAG, CAUSAL, HOLES, BM, BN), b_x, 0)
    else:
        # most tiles are seen whole: the comparison is paid at the edges alone
        if has_hidden(i0, t, n, max_lag, BY_LAG, CAUSAL, BM, BN):
            b_x = tl.where(visible(i0, t, n, max_lag, p_valid, BY_LAG, CAUSAL, HOLES, BM, BN), b_x, 0)
    return b_x


@triton.jit
def hide_all(
    b_x, b_y, b_z, i0, t, n, max_lag, p_valid,
    BY_LAG: tl.constexpr, CAUSAL: tl.constexpr, HOLES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``hide`` for three tiles: together, since every branch in a loop keeps all that is alive in registers."""
    if HOLES:
        seen = visible(i0, t, n, max_lag, p_valid, BY_LAG, CAUSAL, HOLES, BM, BN)
        b_x, b_y, b_z = tl.where(seen, b_x, 0), tl.where(seen, b_y, 0), tl.where(seen, b_z, 0)
    else:
        if has_hidden(i0, t, n, max_lag, BY_LAG, CAUSAL, BM, BN):
            seen = visible(i0, t, n, max_lag, p_valid, BY_LAG, CAUSAL, HOLES, BM, BN)
            b_x, b_y, b_z = tl.where(seen, b_x, 0), tl.where(seen, b_y, 0), tl.where(seen, b_z, 0)
    return b_x, b_y, b_z
