"""Row statistics of the forward: ``z1`` of the first mixing, then ``rho`` and ``z2`` of the selection.

Each program owns ``BM`` query rows of one head and walks their keys once. Scores are made again in
every pass: at a score width of an eighth of the value width that is cheaper than storing them.
"""

import triton
import triton.language as tl

from hypermlp_kernels.blocks import (
    Stream,
    first_column,
    first_token,
    key_tiles,
    locate,
    pick_group,
    row_offsets,
    table_rows,
)
from hypermlp_kernels.scores import mixed_maps, no_columns, queries_of, routing_of, score_columns, scores_of
from hypermlp_kernels.selection import LN2, select
from hypermlp_kernels.skew import high_half, low_half
from hypermlp_kernels.stored import locate_slot, store_map
from hypermlp_kernels.visibility import hide_all


@triton.jit(do_not_specialize=["length", "max_lag", "num_blocks", "q_batch", "q_head", "k_batch", "k_head"])
def routing_statistic_kernel(
    p_q, p_k, p_down, p_z, p_blocks,
    q_batch, q_token, q_head, k_batch, k_token, k_head,
    length, max_lag, num_blocks, num_heads,
    ALIGNED: tl.constexpr, C: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """``z1_i[r] = sum_l s_i[l] A1[l, r]`` of a head's score maps.

    ``p_down`` is ``[maps, L, BR]`` and ``p_z`` ``[B, T, maps, R]``, both contiguous; masked keys are zero.
    """
    BM: tl.constexpr = C.BM
    WIDTH: tl.constexpr = C.NG * M.BR
    TURN: tl.constexpr = "one" if C.GLU and not C.PACKED else "both"
    rows = locate(p_blocks, length, max_lag, num_blocks, num_heads, C)
    if rows.i0 >= rows.n:
        return
    num_maps = num_heads * 2 if C.GLU else num_heads
    p_down_gate = p_down + rows.i_h * max_lag * M.BR
    p_down_scale = p_down_gate + tl.cast(num_heads, tl.int64) * max_lag * M.BR
    q, k = Stream(p_q, q_batch, q_token, q_head), Stream(p_k, k_batch, k_token, k_head)
    queries = queries_of(q, k, rows, ALIGNED, C)
    t_first, t_stop = key_tiles(rows, C)
    scores = scores_of(queries, rows, t_first, C, TURN, C.CHAINED and tl.bfloat16 == C.MIX)

    last = no_columns(C)
    b_z_gate = tl.zeros((BM, WIDTH), C.ACC)
    b_z_scale = b_z_gate
    for t in tl.range(t_first, t_stop, num_stages=C.STAGES):
        words, last = score_columns(scores, last, t, rows.n, C, TURN)
        x0 = first_column(t, rows, C)
        b_gate, b_scale, _ = hide_all(words.gate, words.scale, words.gate, t, rows, p_blocks, C)
        if C.PACKED:
            b_scale = high_half(b_gate)
            b_gate = low_half(b_gate)
        b_down = table_rows(p_down_gate, x0, max_lag, C.NG, C.BN, M.BR)
        b_z_gate = tl.dot(b_gate.to(C.MIX), b_down, b_z_gate, input_precision=C.PRECISION, out_dtype=C.ACC)
        if C.GLU:
            b_down = table_rows(p_down_scale, x0, max_lag, C.NG, C.BN, M.BR)
            b_z_scale = tl.dot(b_scale.to(C.MIX), b_down, b_z_scale, input_precision=C.PRECISION, out_dtype=C.ACC)

    # not by store_rows(): its offsets, of two heads, cost registers
    o_m = tl.arange(0, BM)
    o_r = tl.arange(0, M.BR)
    p_rows = p_z + ((first_token(rows) + rows.i0) * num_maps + rows.i_h) * M.R
    p_rows = p_rows + o_m[:, None].to(tl.int64) * num_maps * M.R + o_r[None, :]
    inside = (rows.i0 + o_m < rows.n)[:, None] & (o_r < M.R)[None, :]
    tl.store(p_rows, pick_group(b_z_gate, C.BM, C.NG, M.BR), mask=inside)
    if C.GLU:
        tl.store(p_rows + num_heads * M.R, pick_group(b_z_scale, C.BM, C.NG, M.BR), mask=inside)


@triton.jit(
    do_not_specialize=[
        "length", "max_lag", "num_blocks", "num_rest", "first_slot", "pitch", "eps",
        "q_batch", "q_head", "k_batch", "k_head", "gate1_batch", "gate1_head",
    ]
)  # fmt: skip
def selection_statistics_kernel(
    p_q, p_k, p_scale1, p_up1, p_gate1, p_z1, p_down2, p_rho, p_z2, p_map, p_blocks, p_valid,
    q_batch, q_token, q_head, k_batch, k_token, k_head, gate1_batch, gate1_token, gate1_head,
    length, max_lag, num_blocks, num_heads, num_rest, first_slot, pitch, eps,
    SLOT: tl.constexpr, ALIGNED: tl.constexpr, C: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr,
):  # fmt: skip
    """``rho_i = max(||g_i||, eps)`` and ``z2_i[r] = sum_l a_i[l] A2[l, r]`` of a head, ``a`` before the norm.

    A rank of zero leaves a low-rank term out. ``p_rho`` is ``[B, T, H]`` and ``p_z2`` ``[B, T, H, R2]``.
    With ``SLOT`` rows to a slot, ``a`` is stored too, of the rows of one chunk (``stored.py``).
    """
    BM: tl.constexpr = C.BM
    WIDTH: tl.constexpr = C.NG * M2.BR
    TURN: tl.constexpr = "one" if C.GLU and not C.PACKED else "both"
    if SLOT > 0:
        rows, slot_row = locate_slot(
            tl.program_id(0), p_blocks, first_slot, length, max_lag, num_blocks, num_rest, num_heads, SLOT, C
        )
    else:
        rows = locate(p_blocks, length, max_lag, num_blocks, num_heads, C)
    if rows.i0 >= rows.n:
        return
    q, k = Stream(p_q, q_batch, q_token, q_head), Stream(p_k, k_batch, k_token, k_head)
    gate = Stream(p_gate1, gate1_batch, gate1_token, gate1_head)
    queries = queries_of(q, k, rows, ALIGNED, C)
    routing = routing_of(p_scale1, p_up1, p_z1, gate, rows, C, M1)
    p_down = p_down2 + rows.i_h * max_lag * M2.BR
    t_first, t_stop = key_tiles(rows, C)
    scores = scores_of(queries, rows, t_first, C, TURN, C.CHAINED)

    last = no_columns(C)
    b_square = tl.zeros((BM,), C.ACC)
    b_z = tl.zeros((BM, WIDTH), C.ACC)
    for t in tl.range(t_first, t_stop, num_stages=C.STAGES):
        words, last = score_columns(scores, last, t, rows.n, C, TURN)
        x0 = first_column(t, rows, C)
        b_gate, b_scale = mixed_maps(words, routing, x0, max_lag, C, M1)
        b_gate, b_scale, _ = hide_all(b_gate, b_scale, b_gate, t, rows, p_valid, C)
        if C.NORM:
            b_square += tl.sum(b_gate * b_gate, axis=1)
        if M2.R > 0 or SLOT > 0:
            b_a = select(b_gate, b_scale, C.GLU, C.PRECISION == "ieee", C.ASM)
        if SLOT > 0:
            store_map(p_map, b_a, slot_row, x0, pitch, C)
        if M2.R > 0:
            b_down = table_rows(p_down, x0, max_lag, C.NG, C.BN, M2.BR)
            b_z = tl.dot(b_a.to(C.MIX), b_down, b_z, input_precision=C.PRECISION, out_dtype=C.ACC)

    o_row, inside = row_offsets(rows, C.BM)
    if C.NORM:
        b_rho = tl.sqrt(b_square)
        # a comparison that a NaN fails: it must reach the output
        tl.store(p_rho + o_row, tl.where(b_rho <= eps, eps, b_rho), mask=inside)
    if M2.R > 0:
        # at the offsets of rho: those of store_rows() cost a build 8 bytes of stack
        o_r = tl.arange(0, M2.BR)
        b_z = pick_group(b_z, C.BM, C.NG, M2.BR) * (LN2 if C.GLU else 1.0)
        tl.store(p_z2 + o_row[:, None] * M2.R + o_r[None, :], b_z, mask=inside[:, None] & (o_r < M2.R)[None, :])
