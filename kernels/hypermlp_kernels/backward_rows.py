"""Backward, along rows: from the output's gradient to those of the weights and of the second mixing's statistic.

Programs own ``BM`` query rows of one head. Two sums over a row stand in the way, one for each mixing's
statistic, so the maps' gradients are kept for a chunk of row blocks: in column order, by tiles
(``backward_blocks``). ``backward_maps`` goes on from there.
"""

import triton
import triton.language as tl

from hypermlp_kernels.backward_blocks import locate_in_chunk, store_statistic_gradient, tile_offsets
from hypermlp_kernels.backward_parts import own_part, store_part
from hypermlp_kernels.blocks import head_of, key_tiles, pick_group, table_rows
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
    V: tl.constexpr, BY_LAG: tl.constexpr, CAUSAL: tl.constexpr, HAS_BLOCKS: tl.constexpr, ALIGNED: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``dw_i[l] = do_i . v_{i-l} / rho_i`` for ``BJ`` keys, into a plane in column order; ``p_do`` is contiguous.

    ``num_slices`` of ``BV`` channels are summed: a number the compiler does not know leaves a loop.
    Hidden elements of the plane hold anything, or are not written.
    """
    i_b, i_h, start, n, i0, tile0 = locate_in_chunk(
        p_blocks, last, origin, length, num_rest, num_heads, full, most, HAS_BLOCKS, BM, BN
    )
    t_first, t_stop = key_tiles(i0, n, max_lag, BY_LAG, CAUSAL, BM, BN)
    j0 = t_first * BN + tl.program_id(1) * BJ
    if (i0 >= n) | (j0 >= t_stop * BN):
        return
    o_m = tl.arange(0, BM)
    o_j = j0 + tl.arange(0, BJ)
    inside = i0 + o_m < n
    o_row = ((i_b * length + start + i0) * num_heads + i_h) + o_m.to(tl.int64) * num_heads
    p_vh = head_of(p_v, i_b, start, i_h, v_batch, v_token, v_head, ALIGNED)
    b_dw = tl.zeros((BM, BJ), ACC)
    for i_v in tl.range(0, num_slices, num_stages=STAGES):
        o_v = i_v * BV + tl.arange(0, BV)
        b_do = tl.load(p_do + o_row[:, None] * V + o_v[None, :], mask=inside[:, None] & (o_v < V)[None, :], other=0.0)
        p_tile = p_vh + o_j[None, :].to(tl.int64) * v_token + o_v[:, None]
        b_v = tl.load(p_tile, mask=(o_j < n)[None, :] & (o_v < V)[:, None], other=0.0)
        b_dw = tl.dot(b_do, b_v, b_dw, input_precision=PRECISION, out_dtype=ACC)
    b_dw = b_dw * (1.0 / tl.load(p_rho + o_row, mask=inside, other=1.0))[:, None]

    # by lag, row m of a group finds key j in the window of tile ceil((j - m) / BN)
    o_in_group = (o_m % BN if BY_LAG else o_m * 0)[:, None]
    o_t = (o_j[None, :] - o_in_group + (BN - 1 if BY_LAG else 0)) // BN
    o_c = o_t * BN + o_in_group - o_j[None, :] if BY_LAG else o_j[None, :] - o_t * BN
    written = o_t < t_stop
    if BY_LAG:
        written = written & (o_j[None, :] <= (i0 + o_m)[:, None])
    # a block's tiles lie within 32 bits of its first
    o_element = (o_t - t_first) * (BM * BN) + o_m[:, None] * BN + o_c
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
    R: tl.constexpr, BY_LAG: tl.constexpr, CAUSAL: tl.constexpr, HAS_BLOCKS: tl.constexpr, HOLES: tl.constexpr,
    GATED: tl.constexpr, GATE_GRADIENT: tl.constexpr, SPLIT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of the second mixing's ``z`` and ``gate``, from ``sum_l dw_i[l] B2[l]``: ``[B, T, H, R]``.

    Of a part of the rows (``SPLIT``): the sum alone, to ``p_dz``, the scratch of ``backward_parts``.
    """
    NG: tl.constexpr = BM // BN if BY_LAG else 1
    i_b, i_h, start, n, i0, tile0 = locate_in_chunk(
        p_blocks, last, origin, length, num_rest, num_heads, full, most, HAS_BLOCKS, BM, BN
    )
    if i0 >= n:
        return
    t_first, t_stop = key_tiles(i0, n, max_lag, BY_LAG, CAUSAL, BM, BN)
    tile0, t_first, t_stop = own_part(tile0, t_first, t_stop, span, SPLIT)
    if SPLIT:  # noqa: SIM102  a compile-time branch
        if t_first >= t_stop:
            return
    first_token = i_b * length + start
    p_hole = p_valid + first_token
    b_dwz = tl.zeros((BM, NG * BR), ACC)
    for t in tl.range(t_first, t_stop, num_stages=STAGES):
        b_dw = tl.load(p_dw + tile_offsets(tile0 + t - t_first, BM, BN, BM))
        b_dw = hide(b_dw, i0, t, n, max_lag, p_hole, BY_LAG, CAUSAL, HOLES, BM, BN)
        b_up = table_rows(p_up + i_h * max_lag * BR, i0 - t * BN if BY_LAG else t * BN, max_lag, NG, BN, BR)
        b_dwz = tl.dot(b_dw, b_up, b_dwz, input_precision=PRECISION, out_dtype=ACC)
    b_dwz = pick_group(b_dwz, BM, NG, BR)
    if SPLIT:
        store_part(p_dz, b_dwz, 0, BM, BR)
    else:
        z_offset = (first_token * num_heads + i_h) * R
        p_gate_rows = head_of(p_gate, i_b, start, i_h, gate_batch, gate_token, gate_head, False)
        store_statistic_gradient(
            b_dwz, p_z + z_offset, p_gate_rows, p_dz + z_offset, p_dgate + z_offset,
            i0, n, num_heads * R, gate_token, R, GATED, GATE_GRADIENT, BM, BR,
        )  # fmt: skip
