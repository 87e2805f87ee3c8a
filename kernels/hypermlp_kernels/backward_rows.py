"""Backward, along rows: from the output's gradient to those of the weights and of the second mixing's statistic.

Programs own ``BM`` query rows of one head. Two sums over a row stand in the way, one for each mixing's
statistic, so the maps' gradients are kept for a chunk of row blocks: in column order, by tiles
(``backward_blocks``). ``backward_maps`` goes on from there.
"""

import triton
import triton.language as tl

from hypermlp_kernels.backward_blocks import Planes, locate_in_chunk, store_statistic_gradient, tile_offsets
from hypermlp_kernels.backward_parts import part_of, store_part
from hypermlp_kernels.blocks import (
    Stream,
    first_column,
    first_token,
    head_of,
    key_tiles,
    pick_group,
    row_offsets,
    table_rows,
)
from hypermlp_kernels.visibility import hide


@triton.jit(
    do_not_specialize=[
        "length", "max_lag", "num_rest", "last", "origin", "full", "most", "num_slices", "v_batch", "v_head",
    ]
)  # fmt: skip
def weight_gradient_kernel(
    p_do, p_v, p_rho, p_dw, p_blocks,
    v_batch, v_token, v_head,
    length, max_lag, num_rest, num_heads, last, origin, full, most, num_slices,
    V: tl.constexpr, BJ: tl.constexpr, BV: tl.constexpr, ALIGNED: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """``dw_i[l] = do_i . v_{i-l} / rho_i`` for ``BJ`` keys, into a plane in column order; ``p_do`` is contiguous.

    ``num_slices`` of ``BV`` channels are summed: a number the compiler does not know leaves a loop.
    Hidden elements of the plane hold anything, or are not written.
    """
    BM: tl.constexpr = C.BM
    BN: tl.constexpr = C.BN
    rows, tile0 = locate_in_chunk(p_blocks, last, Planes(num_rest, origin, full, most), length, max_lag, num_heads, C)
    t_first, t_stop = key_tiles(rows, C)
    o_block = tl.program_id(1) * BJ + tl.arange(0, BJ)
    if (rows.i0 >= rows.n) | (tl.program_id(1) * BJ >= (t_stop - t_first) * BN):
        return
    o_m = tl.arange(0, BM)
    o_j = t_first * BN + o_block
    o_row, inside = row_offsets(rows, BM)
    v = head_of(Stream(p_v, v_batch, v_token, v_head), rows, rows.i_h, ALIGNED)
    b_dw = tl.zeros((BM, BJ), C.ACC)
    for i_v in tl.range(0, num_slices, num_stages=C.STAGES):
        o_v = i_v * BV + tl.arange(0, BV)
        b_do = tl.load(p_do + o_row[:, None] * V + o_v[None, :], mask=inside[:, None] & (o_v < V)[None, :], other=0.0)
        p_tile = v.p + o_j[None, :].to(tl.int64) * v_token + o_v[:, None]
        b_v = tl.load(p_tile, mask=(o_j < rows.n)[None, :] & (o_v < V)[:, None], other=0.0)
        b_dw = tl.dot(b_do, b_v, b_dw, input_precision=C.PRECISION, out_dtype=C.ACC)
    b_dw = b_dw * (1.0 / tl.load(p_rho + o_row, mask=inside, other=1.0))[:, None]

    # a block's tiles lie within 32 bits of its first
    if C.BY_LAG:
        # row m of a group finds the block's key j in the window of tile ceil((j - m) / BN)
        o_in_group = (o_m % BN)[:, None]
        o_t = ((o_block[None, :] - o_in_group + (BN - 1)).to(tl.uint32) // BN).to(tl.int32)
        o_element = o_t * (BM * BN + BN) - o_block[None, :] + (o_m[:, None] * BN + o_in_group)
        written = o_t <= tl.minimum(rows.i0 // BN + (o_m // BN)[:, None], t_stop - 1) - t_first
    else:
        o_element = o_m[:, None] * BN + (o_block + o_block // BN * (BM * BN - BN))[None, :]
        written = (o_j < t_stop * BN)[None, :] & (o_m >= 0)[:, None]
    tl.store(p_dw + tile0 * (BM * BN) + o_element, b_dw.to(p_dw.dtype.element_ty), mask=written)


@triton.jit(
    do_not_specialize=[
        "length", "max_lag", "num_rest", "last", "origin", "full", "most", "span", "gate_batch", "gate_head",
    ]
)  # fmt: skip
def readout_statistic_gradient_kernel(
    p_dw, p_up, p_gate, p_z, p_dz, p_dgate, p_blocks, p_valid,
    gate_batch, gate_token, gate_head,
    length, max_lag, num_rest, num_heads, last, origin, full, most, span,
    GATE_GRADIENT: tl.constexpr, SPLIT: tl.constexpr, C: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Gradients of the second mixing's ``z`` and ``gate``, from ``sum_l dw_i[l] B2[l]``: ``[B, T, H, R]``.

    Of a part of the rows (``SPLIT``): the sum alone, to ``p_dz``, the scratch of ``backward_parts``.
    """
    BM: tl.constexpr = C.BM
    WIDTH: tl.constexpr = C.NG * M.BR
    planes = Planes(num_rest, origin, full, most)
    rows, tile0 = locate_in_chunk(p_blocks, last, planes, length, max_lag, num_heads, C)
    if rows.i0 >= rows.n:
        return
    part = part_of(rows, tile0, span, SPLIT, C)
    if SPLIT:  # noqa: SIM102  a compile-time branch
        if part.t_first >= part.t_stop:
            return
    p_up += rows.i_h * max_lag * M.BR
    # here, not after the loop: there it costs the smaller tiles registers
    token = first_token(rows)
    b_dwz = tl.zeros((BM, WIDTH), C.ACC)
    for t in tl.range(part.t_first, part.t_stop, num_stages=C.STAGES):
        b_dw = tl.load(p_dw + tile_offsets(part.tile0 + t - part.t_first, C.BM, C.BN, C.BM))
        b_dw = hide(b_dw, t, rows, p_valid, C)
        b_up = table_rows(p_up, first_column(t, rows, C), max_lag, C.NG, C.BN, M.BR)
        b_dwz = tl.dot(b_dw, b_up, b_dwz, input_precision=C.PRECISION, out_dtype=C.ACC)
    b_dwz = pick_group(b_dwz, C.BM, C.NG, M.BR)
    if SPLIT:
        store_part(p_dz, b_dwz, 0, C.BM, M.BR)
    else:
        gate = Stream(p_gate, gate_batch, gate_token, gate_head)
        store_statistic_gradient(b_dwz, p_z, gate, p_dz, p_dgate, 0, num_heads, token, rows, GATE_GRADIENT, C.BM, M)
