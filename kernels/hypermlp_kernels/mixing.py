"""A sequence mixing of one map, ``x * scale + (gate * z) table^T``, beside the tiles of a program's rows."""

from typing import NamedTuple

import triton
import triton.language as tl

from hypermlp_kernels.blocks import compact_head, head_of, load_rows, place_group, scale_rows, table_rows
from hypermlp_kernels.skew import rotation_index


class Mixing(NamedTuple):
    """The rows' ``gate * z`` as a dot operand (anything without a low-rank term), and the map's tables."""

    b_w: tl.tensor
    p_scale: tl.tensor
    p_table: tl.tensor


@triton.jit
def gated_statistic(z, gate, rows, unit, GATED: tl.constexpr, C: tl.constexpr, M: tl.constexpr):
    """``unit * gate * z`` of the program's rows as a dot operand ``[BM, NG * BR]``."""
    b_w = load_rows(z, rows.i0, rows.n, M.R, C.BM, M.BR) * unit
    if GATED:
        b_w = b_w * load_rows(gate, rows.i0, rows.n, M.R, C.BM, M.BR).to(b_w.dtype)
    return place_group(b_w, C.BM, C.NG, M.BR).to(C.MIX)


@triton.jit
def mixing_of(p_scale, p_table, p_z, gate, i_map, num_maps, unit, rows, C: tl.constexpr, M: tl.constexpr):
    """The mixing of map ``i_map``, with ``z`` in ``unit``.

    Of the tables ``[num_maps, max_lag(, BR)]``, ``z`` ``[B, T, num_maps, R]`` and the :class:`Stream` of gates.
    """
    b_w = rows.i0
    if M.R > 0:
        z = compact_head(p_z, rows, i_map, num_maps, M.R)
        b_w = gated_statistic(z, head_of(gate, rows, i_map, False), rows, unit, M.GATED, C, M)
    first = i_map * rows.max_lag
    return Mixing(b_w, p_scale + first, p_table + first * M.BR)


@triton.jit
def mix(
    b_x, mixing, x0, max_lag, UNIT: tl.constexpr, C: tl.constexpr, M: tl.constexpr, EDGE: tl.constexpr = True
):  # fmt: skip
    """A tile in column order mixed; ``UNIT`` is the identity in the map's unit, ``EDGE`` as in ``table_rows``."""
    if M.SCALE == "table":
        b_y = b_x * scale_rows(mixing.p_scale, x0, max_lag, C.NG, C.BN, EDGE)
    elif M.SCALE == "identity":
        b_y = b_x * UNIT
    else:
        b_y = b_x * 0.0
    if M.R > 0:
        b_table = tl.trans(table_rows(mixing.p_table, x0, max_lag, C.NG, C.BN, M.BR, EDGE))
        b_y = tl.dot(mixing.b_w, b_table, b_y, input_precision=C.PRECISION, out_dtype=b_y.dtype)
    return b_y


@triton.jit
def mixing_index(mixing, x0, max_lag, ASM: tl.constexpr, C: tl.constexpr, M: tl.constexpr):
    """:func:`rotation_index` where there are no scores to take the layout of: that of the low-rank product."""
    BM: tl.constexpr = C.BM
    BN: tl.constexpr = C.BN
    b_anchor = tl.zeros((BM, BN), C.ACC)
    if M.R > 0:
        b_table = tl.trans(table_rows(mixing.p_table, x0, max_lag, C.NG, C.BN, M.BR))
        b_anchor = tl.dot(mixing.b_w, b_table, input_precision=C.PRECISION, out_dtype=C.ACC)
    return rotation_index(b_anchor, C.BM, C.BN, ASM)
