"""Which elements of a tile in column order its rows see, and zeros in place of the others."""

import triton
import triton.language as tl

from hypermlp_kernels.blocks import first_column, first_token


@triton.jit
def has_hidden(t, rows, C: tl.constexpr):
    """Whether the tile may have an element that its row does not see (masked tokens aside)."""
    if C.BY_LAG:
        # the last row's window opens last; a group above the diagonal has negative lags
        first_key = tl.maximum(rows.i0 + C.BM - rows.max_lag, 0)
        hidden = (t * C.BN < first_key + C.BN - 1) | (t * C.BN > rows.i0)
    else:
        hidden = t * C.BN + C.BN > rows.n
        if C.CAUSAL:
            hidden = hidden | (t * C.BN + C.BN - 1 > rows.i0)
    return hidden


@triton.jit
def stretches(rows, t_first, t_stop, C: tl.constexpr):
    """Key tiles ``t_first`` to ``t_stop`` in stretches: at an edge, within, at the other edge; as their four bounds.

    Of those within every row sees every key, and every column. With masked tokens anywhere all tiles are in the first.
    """
    if C.HOLES:
        return t_first, t_stop, t_stop, t_stop
    else:  # noqa: RET505  a compile-time branch
        low = t_first
        high = rows.n // C.BN
        if C.BY_LAG:
            # the last row's window opens last, and a tile's columns have keys of the tile before it
            low = tl.cdiv(tl.maximum(rows.i0 + C.BM - rows.max_lag, 0), C.BN) + 1
        if C.CAUSAL:
            high = rows.i0 // C.BN
        low = tl.minimum(tl.maximum(low, t_first), t_stop)
        return t_first, low, tl.minimum(tl.maximum(high, low), t_stop), t_stop


@triton.jit
def visible(t, rows, p_valid, C: tl.constexpr):
    """Which elements of a tile in column order their rows see, ``[BM, BN]``; ``p_valid`` is uint8 ``[B, T]``."""
    o_m = tl.arange(0, C.BM)
    o_i = (rows.i0 + o_m)[:, None]
    o_c = tl.arange(0, C.BN)[None, :]
    if C.BY_LAG:
        o_lag = first_column(t, rows, C) + (o_m // C.BN * C.BN)[:, None] + o_c
        o_j = o_i - o_lag
        seen = (o_lag >= 0) & (o_lag < tl.minimum(o_i + 1, rows.max_lag))
    else:
        o_j = t * C.BN + o_c
        seen = (o_j < rows.n) & (o_i >= 0)
        if C.CAUSAL:
            seen = seen & (o_j <= o_i)
    if C.HOLES:
        seen = seen & (tl.load(p_valid + first_token(rows) + o_j, mask=seen & (o_j < rows.n), other=0) != 0)
    return seen


@triton.jit
def hide(b_x, t, rows, p_valid, C: tl.constexpr):
    """``x`` in column order with zeros, whatever it held, where the row does not see the column."""
    if C.HOLES:
        b_x = tl.where(visible(t, rows, p_valid, C), b_x, 0)
    else:
        # most tiles are seen whole: the comparison is paid at the edges alone
        if has_hidden(t, rows, C):
            b_x = tl.where(visible(t, rows, p_valid, C), b_x, 0)
    return b_x


@triton.jit
def hide_all(b_x, b_y, b_z, t, rows, p_valid, C: tl.constexpr):
    """``hide`` for three tiles: together, since every branch in a loop keeps all that is alive in registers."""
    if C.HOLES:
        seen = visible(t, rows, p_valid, C)
        b_x, b_y, b_z = tl.where(seen, b_x, 0), tl.where(seen, b_y, 0), tl.where(seen, b_z, 0)
    else:
        if has_hidden(t, rows, C):
            seen = visible(t, rows, p_valid, C)
            b_x, b_y, b_z = tl.where(seen, b_x, 0), tl.where(seen, b_y, 0), tl.where(seen, b_z, 0)
    return b_x, b_y, b_z
