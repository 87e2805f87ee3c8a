"""Row statistics of the forward: ``z1`` of the first mixing, then ``rho`` and ``z2`` of the selection.

Each program owns ``BM`` query rows of one head and walks their keys once. Scores are made again in
every pass: at a score width of an eighth of the value width that is cheaper than storing them.
"""

import triton
import triton.language as tl

from hypermlp_kernels.blocks import (
    LN2,
    LOG2E,
    as_floats,
    gated_statistic,
    head_of,
    key_tiles,
    load_keys,
    load_rows,
    locate,
    mix,
    pick_group,
    score_columns,
    select,
    table_rows,
)
from hypermlp_kernels.skew import high_half, low_half, rotation_index
from hypermlp_kernels.stored import locate_slot, store_map
from hypermlp_kernels.visibility import hide_all


@triton.jit(do_not_specialize=["length", "max_lag", "num_blocks", "q_batch", "q_head", "k_batch", "k_head"])
def routing_statistic_kernel(
    p_q, p_k, p_down, p_z, p_blocks,
    q_batch, q_token, q_head, k_batch, k_token, k_head,
    length, max_lag, num_blocks, num_heads,
    K: tl.constexpr, R: tl.constexpr,
    GLU: tl.constexpr, BY_LAG: tl.constexpr, CAUSAL: tl.constexpr, HAS_BLOCKS: tl.constexpr, ALIGNED: tl.constexpr,
    PACKED: tl.constexpr, ASM: tl.constexpr, ACC: tl.constexpr, MIX: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``z1_i[r] = sum_l s_i[l] A1[l, r]`` of a head's score maps.

    ``p_down`` is ``[maps, L, BR]`` and ``p_z`` ``[B, T, maps, R]``, both contiguous; masked keys are zero.
    """
    NG: tl.constexpr = BM // BN if BY_LAG else 1
    i_b, i_h, start, n, i0 = locate(p_blocks, length, num_blocks, num_heads, HAS_BLOCKS, BM)
    if i0 >= n:
        return
    num_maps = num_heads * 2 if GLU else num_heads
    p_qg = head_of(p_q, i_b, start, i_h, q_batch, q_token, q_head, ALIGNED)
    p_qs = head_of(p_q, i_b, start, i_h + num_heads, q_batch, q_token, q_head, ALIGNED)
    p_kg = head_of(p_k, i_b, start, i_h, k_batch, k_token, k_head, ALIGNED)
    p_ks = head_of(p_k, i_b, start, i_h + num_heads, k_batch, k_token, k_head, ALIGNED)
    p_down_gate = p_down + i_h * max_lag * BR
    p_down_scale = p_down_gate + tl.cast(num_heads, tl.int64) * max_lag * BR
    b_qg = load_rows(p_qg, i0, n, q_token, K, BM, BK)
    b_qs = b_qg
    if GLU:
        b_qs = load_rows(p_qs, i0, n, q_token, K, BM, BK)
    t_first, t_stop = key_tiles(i0, n, max_lag, BY_LAG, CAUSAL, BM, BN)

    b_anchor = tl.dot(b_qg, load_keys(p_kg, t_first, n, k_token, K, BN, BK), input_precision=PRECISION, out_dtype=ACC)
    b_index = rotation_index(b_anchor, BM, BN, ASM)
    b_last_gate = tl.zeros((BM, BN), tl.int32 if PACKED else ACC)
    b_last_scale = b_last_gate
    b_z_gate = tl.zeros((BM, NG * BR), ACC)
    b_z_scale = b_z_gate
    for t in tl.range(t_first, t_stop, num_stages=STAGES):
        b_gate, b_scale, b_last_gate, b_last_scale = score_columns(
            b_qg, b_qs, p_kg, p_ks, t, n, k_token, b_index, b_last_gate, b_last_scale,
            K, GLU, BY_LAG, PACKED, ASM, ACC, PRECISION, BM, BN, BK,
        )  # fmt: skip
        x0 = i0 - t * BN if BY_LAG else t * BN
        b_gate, b_scale, _ = hide_all(
            b_gate, b_scale, b_gate, i0, t, n, max_lag, p_blocks, BY_LAG, CAUSAL, False, BM, BN
        )
        if PACKED:
            b_scale = high_half(b_gate)
            b_gate = low_half(b_gate)
        b_down = table_rows(p_down_gate, x0, max_lag, NG, BN, BR)
        b_z_gate = tl.dot(b_gate.to(MIX), b_down, b_z_gate, input_precision=PRECISION, out_dtype=ACC)
        if GLU:
            b_down = table_rows(p_down_scale, x0, max_lag, NG, BN, BR)
            b_z_scale = tl.dot(b_scale.to(MIX), b_down, b_z_scale, input_precision=PRECISION, out_dtype=ACC)

    o_m = tl.arange(0, BM)
    o_r = tl.arange(0, BR)
    p_out = p_z + ((i_b * length + start + i0) * num_maps + i_h) * R
    p_out = p_out + o_m[:, None].to(tl.int64) * num_maps * R + o_r[None, :]
    inside = (i0 + o_m < n)[:, None] & (o_r < R)[None, :]
    tl.store(p_out, pick_group(b_z_gate, BM, NG, BR), mask=inside)
    if GLU:
        tl.store(p_out + num_heads * R, pick_group(b_z_scale, BM, NG, BR), mask=inside)


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
    K: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr,
    GLU: tl.constexpr, BY_LAG: tl.constexpr, CAUSAL: tl.constexpr, HAS_BLOCKS: tl.constexpr, HOLES: tl.constexpr,
    SCALE1: tl.constexpr, GATED1: tl.constexpr, NORM: tl.constexpr, ALIGNED: tl.constexpr,
    PACKED: tl.constexpr, ASM: tl.constexpr, ACC: tl.constexpr, MIX: tl.constexpr, PRECISION: tl.constexpr,
    SLOT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR1: tl.constexpr, BR2: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``rho_i = max(||g_i||, eps)`` and ``z2_i[r] = sum_l a_i[l] A2[l, r]`` of a head, ``a`` before the norm.

    A rank of zero leaves a low-rank term out. ``p_rho`` is ``[B, T, H]`` and ``p_z2`` ``[B, T, H, R2]``.
    With ``SLOT`` rows to a slot, ``a`` is stored too, of the rows of one chunk (``stored.py``).
    """
    NG: tl.constexpr = BM // BN if BY_LAG else 1
    LOW_RANK1: tl.constexpr = R1 > 0
    if SLOT > 0:
        i_b, i_h, start, n, i0, row = locate_slot(
            tl.program_id(0), p_blocks, first_slot, length, num_blocks, num_rest, num_heads, HAS_BLOCKS, SLOT, BM
        )
    else:
        i_b, i_h, start, n, i0 = locate(p_blocks, length, num_blocks, num_heads, HAS_BLOCKS, BM)
    if i0 >= n:
        return
    num_maps = num_heads * 2 if GLU else num_heads
    first_token = i_b * length + start
    p_qg = head_of(p_q, i_b, start, i_h, q_batch, q_token, q_head, ALIGNED)
    p_qs = head_of(p_q, i_b, start, i_h + num_heads, q_batch, q_token, q_head, ALIGNED)
    p_kg = head_of(p_k, i_b, start, i_h, k_batch, k_token, k_head, ALIGNED)
    p_ks = head_of(p_k, i_b, start, i_h + num_heads, k_batch, k_token, k_head, ALIGNED)
    p_scale1_gate = p_scale1 + i_h * max_lag
    p_scale1_scale = p_scale1_gate + tl.cast(num_heads, tl.int64) * max_lag
    p_up1_gate = p_up1 + i_h * max_lag * BR1
    p_up1_scale = p_up1_gate + tl.cast(num_heads, tl.int64) * max_lag * BR1
    p_down = p_down2 + i_h * max_lag * BR2
    p_hole = p_valid + first_token
    b_qg = load_rows(p_qg, i0, n, q_token, K, BM, BK)
    b_qs = b_qg
    b_wg = b_qg
    b_ws = b_qg
    if GLU:
        b_qs = load_rows(p_qs, i0, n, q_token, K, BM, BK)
    if LOW_RANK1:
        p_z = p_z1 + (first_token * num_maps + i_h) * R1
        p_gate = head_of(p_gate1, i_b, start, i_h, gate1_batch, gate1_token, gate1_head, False)
        b_wg = gated_statistic(
            p_z, p_gate, i0, n, num_maps * R1, gate1_token, 1.0, R1, GATED1, MIX, BM, NG, BR1
        )  # fmt: skip
        if GLU:
            b_ws = gated_statistic(
                p_z + num_heads * R1, p_gate + num_heads * gate1_head, i0, n, num_maps * R1, gate1_token, LOG2E,
                R1, GATED1, MIX, BM, NG, BR1,
            )  # fmt: skip
    t_first, t_stop = key_tiles(i0, n, max_lag, BY_LAG, CAUSAL, BM, BN)

    b_anchor = tl.dot(b_qg, load_keys(p_kg, t_first, n, k_token, K, BN, BK), input_precision=PRECISION, out_dtype=ACC)
    b_index = rotation_index(b_anchor, BM, BN, ASM)
    b_last_gate = tl.zeros((BM, BN), tl.int32 if PACKED else ACC)
    b_last_scale = b_last_gate
    b_square = tl.zeros((BM,), ACC)
    b_z = tl.zeros((BM, NG * BR2), ACC)
    for t in tl.range(t_first, t_stop, num_stages=STAGES):
        b_gate, b_scale, b_last_gate, b_last_scale = score_columns(
            b_qg, b_qs, p_kg, p_ks, t, n, k_token, b_index, b_last_gate, b_last_scale,
            K, GLU, BY_LAG, PACKED, ASM, ACC, PRECISION, BM, BN, BK,
        )  # fmt: skip
        x0 = i0 - t * BN if BY_LAG else t * BN
        b_gate, b_scale = as_floats(b_gate, b_scale, PACKED)
        b_gate = mix(
            b_gate, b_wg, p_scale1_gate, p_up1_gate, x0, max_lag, 1.0, SCALE1, LOW_RANK1, PRECISION, NG, BN, BR1
        )
        if GLU:
            b_scale = mix(
                b_scale, b_ws, p_scale1_scale, p_up1_scale, x0, max_lag, LOG2E,
                SCALE1, LOW_RANK1, PRECISION, NG, BN, BR1,
            )  # fmt: skip
        b_gate, b_scale, _ = hide_all(b_gate, b_scale, b_gate, i0, t, n, max_lag, p_hole, BY_LAG, CAUSAL, HOLES, BM, BN)
        if NORM:
            b_square += tl.sum(b_gate * b_gate, axis=1)
        if R2 > 0 or SLOT > 0:
            b_a = select(b_gate, b_scale, GLU, ASM)
        if SLOT > 0:
            store_map(p_map, b_a, row, x0, pitch, BY_LAG, BM, BN)
        if R2 > 0:
            b_down = table_rows(p_down, x0, max_lag, NG, BN, BR2)
            b_z = tl.dot(b_a.to(MIX), b_down, b_z, input_precision=PRECISION, out_dtype=ACC)

    o_m = tl.arange(0, BM)
    o_row = ((first_token + i0) * num_heads + i_h) + o_m.to(tl.int64) * num_heads
    inside = i0 + o_m < n
    if NORM:
        b_rho = tl.sqrt(b_square)
        # a comparison that a NaN fails: it must reach the output
        tl.store(p_rho + o_row, tl.where(b_rho <= eps, eps, b_rho), mask=inside)
    if R2 > 0:
        o_r = tl.arange(0, BR2)
        b_z = pick_group(b_z, BM, NG, BR2) * (LN2 if GLU else 1.0)
        tl.store(p_z2 + o_row[:, None] * R2 + o_r[None, :], b_z, mask=inside[:, None] & (o_r < R2)[None, :])
