"""Backward, along columns: the gradients of a mixing's tables.

A program owns ``BN`` table rows (a lag window, or a key tile by position) of one map and walks the
query rows of the chunk, so every element has one owner and a fixed order of summation.
"""

import triton
import triton.language as tl

from hypermlp_kernels.backward_blocks import block_tiles, tile_offsets
from hypermlp_kernels.blocks import gated_statistic, head_of, key_tiles, load_keys, load_rows, place
from hypermlp_kernels.skew import rotate, rotation_index
from hypermlp_kernels.visibility import hide


@triton.jit
def scores_of_window(
    b_q, p_k, t, n, k_stride, b_index,
    K: tl.constexpr, BY_LAG: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Scores in column order, alone: by lag they come from two key tiles, selected before one rotation."""
    b_s = tl.dot(b_q, load_keys(p_k, t, n, k_stride, K, BN, BK), input_precision=PRECISION, out_dtype=ACC)
    if BY_LAG:
        # before the first tile there is nothing: what is read in its place is hidden later
        b_keys = load_keys(p_k, tl.maximum(t - 1, 0), n, k_stride, K, BN, BK)
        current = tl.arange(0, BN)[None, :] <= tl.arange(0, ROWS)[:, None]
        b_s = tl.where(current, b_s, tl.dot(b_q, b_keys, input_precision=PRECISION, out_dtype=ACC))
        b_s = rotate(b_s, b_index, ROWS, BN)
    return b_s


@triton.jit
def sum_rows(b_x, ROWS: tl.constexpr, BN: tl.constexpr):
    """Column sums as far as a dot's result has them in one thread, ``[ROWS / 2, BN]``."""
    return tl.reshape(tl.sum(tl.reshape(b_x, (ROWS // 16, 2, 8, BN)), axis=1), (ROWS // 2, BN))


@triton.jit
def add_tile(
    b_ddiag, b_ddown, b_dup, p_q, p_k, p_x, p_dy, p_z, p_gate, p_dz, p_hole, b_index,
    q_token, k_token, gate_token, r0, t, n, max_lag, num_maps,
    K: tl.constexpr, R: tl.constexpr,
    SCORES: tl.constexpr, DIAG: tl.constexpr, DOWN: tl.constexpr, UP: tl.constexpr, GATED: tl.constexpr,
    BY_LAG: tl.constexpr, CAUSAL: tl.constexpr, HOLES: tl.constexpr,
    ACC: tl.constexpr, MIX: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """One tile's part of :func:`table_gradient_kernel`, rows ``r0 ..``, whose maps ``p_x`` and ``p_dy`` point at."""
    b_dy = tl.load(p_dy)
    if SCORES:
        b_q = load_rows(p_q, r0, n, q_token, K, ROWS, BK)
        b_x = scores_of_window(b_q, p_k, t, n, k_token, b_index, K, BY_LAG, ACC, PRECISION, ROWS, BN, BK)
        b_x = hide(b_x, r0, t, n, max_lag, p_hole, BY_LAG, CAUSAL, False, ROWS, BN)
    else:
        b_dy = hide(b_dy, r0, t, n, max_lag, p_hole, BY_LAG, CAUSAL, HOLES, ROWS, BN)
        b_x = b_dy
        if DIAG or DOWN:
            b_x = tl.load(p_x)
    if DIAG:
        b_product = b_x.to(ACC) * b_dy.to(ACC)
        b_ddiag += sum_rows(b_product, ROWS, BN) if SCORES else b_product
    if DOWN:
        b_dz = gated_statistic(p_dz, p_dz, r0, n, num_maps * R, 0, 1.0, R, False, MIX, ROWS, 1, BR)
        b_ddown = tl.dot(tl.trans(b_x.to(MIX)), b_dz, b_ddown, input_precision=PRECISION, out_dtype=ACC)
    if UP:
        b_w = gated_statistic(p_z, p_gate, r0, n, num_maps * R, gate_token, 1.0, R, GATED, MIX, ROWS, 1, BR)
        b_dup = tl.dot(tl.trans(b_dy), b_w, b_dup, input_precision=PRECISION, out_dtype=ACC)
    return b_ddiag, b_ddown, b_dup


@triton.jit(
    do_not_specialize=[
        "length", "max_lag", "rows", "num_rest", "first", "stop", "origin", "full", "most", "plane",
        "q_batch", "q_head", "k_batch", "k_head", "gate_batch", "gate_head",
    ]
)  # fmt: skip
def table_gradient_kernel(
    p_q, p_k, p_x, p_dy, p_z, p_gate, p_dz, p_ddiag, p_ddown, p_dup, p_blocks, p_valid,
    q_batch, q_token, q_head, k_batch, k_token, k_head, gate_batch, gate_token, gate_head,
    length, max_lag, rows, num_rest, num_heads, num_maps, first, stop, origin, full, most, plane,
    K: tl.constexpr, R: tl.constexpr,
    SCORES: tl.constexpr, DIAG: tl.constexpr, DOWN: tl.constexpr, UP: tl.constexpr, GATED: tl.constexpr,
    BY_LAG: tl.constexpr, CAUSAL: tl.constexpr, HAS_BLOCKS: tl.constexpr, HOLES: tl.constexpr,
    ALIGNED: tl.constexpr, ALIGNED_GATE: tl.constexpr,
    ASM: tl.constexpr, ACC: tl.constexpr, MIX: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds to the gradients of ``diag``, ``down`` and ``up``: ``sum x dy``, ``sum x dz`` and ``sum dy (gate z)``.

    ``x`` is the mixing's input: scores, made again, or the map in plane ``p_x``. ``dy`` is in plane ``p_dy``,
    for the program's score map ``plane`` tiles further on. Gradients are ``[batches, maps, rows(, BR)]``: each
    batch row has sums of its own, or with a block table there is one for all.
    """
    NG: tl.constexpr = BM // BN if BY_LAG else 1
    ROWS: tl.constexpr = BN if BY_LAG else BM
    window = tl.program_id(0) // num_rest
    i_rest = tl.program_id(0) % num_rest
    i_first = tl.cdiv(first - i_rest, num_rest)
    i_stop = tl.cdiv(stop - i_rest, num_rest)
    if not HAS_BLOCKS and CAUSAL:
        i_first = tl.maximum(i_first, window * BN // BM)
    if i_first >= i_stop:
        return

    i_map = tl.program_id(1) * num_heads + (i_rest if HAS_BLOCKS else i_rest % num_heads)
    i_batch = i_rest * 0 if HAS_BLOCKS else i_rest // num_heads
    p_dy += tl.program_id(1).to(tl.int64) * plane * (BM * BN)
    b_index = window
    if SCORES:
        # of the first token's scores the rotation takes the layout alone
        b_first = load_rows(p_q, window * 0, 1, q_token, K, ROWS, BK)
        b_anchor = tl.dot(
            b_first, load_keys(p_k, window * 0, 1, k_token, K, BN, BK), input_precision=PRECISION, out_dtype=ACC
        )
        b_index = rotation_index(b_anchor, ROWS, BN, ASM)
    b_ddiag = tl.zeros((ROWS // 2 if SCORES else ROWS, BN), ACC)
    b_ddown = tl.zeros((BN, BR), ACC)
    b_dup = tl.zeros((BN, BR), ACC)
    unit_first = i_first * NG
    unit_stop = i_stop * NG
    if BY_LAG and not HAS_BLOCKS:
        unit_first = tl.maximum(unit_first, window)
        unit_stop = tl.minimum(unit_stop, tl.cdiv(length, BN))
    for unit in tl.range(unit_first, unit_stop, num_stages=STAGES):
        i_b, _, start, n, i0 = place(p_blocks, unit // NG, i_rest, length, num_heads, HAS_BLOCKS, BM)
        t_first, t_stop = key_tiles(i0, n, max_lag, BY_LAG, CAUSAL, BM, BN)
        r0 = i0 + unit % NG * BN
        t = window
        if BY_LAG:
            t = r0 // BN - window
        tile = block_tiles(unit // NG, i_rest, origin, num_rest, full, most, BM // BN) + t - t_first
        o_tile = tile_offsets(tile, ROWS, BN, BM) + (r0 - i0) * BN
        first_token = i_b * length + start
        p_hole = p_valid + first_token
        p_q_rows = head_of(p_q, i_b, start, i_map, q_batch, q_token, q_head, ALIGNED)
        p_k_rows = head_of(p_k, i_b, start, i_map, k_batch, k_token, k_head, ALIGNED)
        p_z_rows = p_z + (first_token * num_maps + i_map) * R
        p_dz_rows = p_dz + (first_token * num_maps + i_map) * R
        p_gate_rows = head_of(p_gate, i_b, start, i_map, gate_batch, gate_token, gate_head, ALIGNED_GATE)
        # of one sequence, every row of the range has a tile beside the window; of several, some have none
        if not HAS_BLOCKS or ((r0 < n) & (t >= t_first) & (t < t_stop)):
            b_ddiag, b_ddown, b_dup = add_tile(
                b_ddiag, b_ddown, b_dup, p_q_rows, p_k_rows, p_x + o_tile, p_dy + o_tile, p_z_rows, p_gate_rows,
                p_dz_rows, p_hole, b_index, q_token, k_token, gate_token, r0, t, n, max_lag, num_maps,
                K, R, SCORES, DIAG, DOWN, UP, GATED, BY_LAG, CAUSAL, HOLES, ACC, MIX, PRECISION, ROWS, BN, BK, BR,
            )  # fmt: skip

    o_x = window * BN + tl.arange(0, BN)
    o_row = (i_batch * num_maps + i_map).to(tl.int64) * rows + o_x
    inside = o_x < rows
    o_low_rank = o_row[:, None] * BR + tl.arange(0, BR)[None, :]
    if DIAG:
        b_ddiag = tl.sum(b_ddiag, axis=0) + tl.load(p_ddiag + o_row, mask=inside)
        tl.store(p_ddiag + o_row, b_ddiag, mask=inside)
    if DOWN:
        b_ddown += tl.load(p_ddown + o_low_rank, mask=inside[:, None])
        tl.store(p_ddown + o_low_rank, b_ddown, mask=inside[:, None])
    if UP:
        b_dup += tl.load(p_dup + o_low_rank, mask=inside[:, None])
        tl.store(p_dup + o_low_rank, b_dup, mask=inside[:, None])
