"""The readout: maps made again from the row statistics, and their product with the values.

Nothing of size ``T x T`` is stored. A program owns ``BM`` query rows and ``BV`` value channels of one
head. By lag the weights of key tile ``t - 1`` come from the lag windows of key tiles ``t - 1`` and
``t``, so the product runs one tile behind the scores.
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
    score_columns,
    select,
)
from hypermlp_kernels.skew import rotate, rotation_index
from hypermlp_kernels.visibility import hide


@triton.jit
def load_values(p_v, p_count, t, i_v, n, stride, num_heads, WIDTH: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr):
    """``[BN, BV]``: a tile of values, channel block ``i_v``, zero for tokens that hold a NaN or an infinity.

    A hidden key has weight zero, and zero times NaN is NaN. ``p_count`` counts such tokens before each.
    """
    o_j = t * BN + tl.arange(0, BN)
    o_v = i_v * BV + tl.arange(0, BV)
    inside = (o_j >= 0) & (o_j < n)
    before = tl.load(p_count + o_j * num_heads, mask=inside, other=0)
    after = tl.load(p_count + (o_j + 1) * num_heads, mask=inside, other=0)
    mask = (inside & (before == after))[:, None]
    if WIDTH % BV != 0:
        mask = mask & (o_v < WIDTH)[None, :]
    p_first = p_v + tl.cast(t * BN, tl.int64) * stride
    return tl.load(p_first + tl.arange(0, BN)[:, None] * stride + o_v[None, :], mask=mask, other=0.0)


@triton.jit
def store_output(
    b_o, p_o, p_count, i0, i_v, n, max_lag, num_heads,
    WIDTH: tl.constexpr, BY_LAG: tl.constexpr, CAUSAL: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Store a block of output; a row that sees a value that is not finite becomes NaN."""
    o_m = tl.arange(0, BM)
    inside = i0 + o_m < n
    o_last = i0 + o_m + 1
    o_first = tl.zeros((BM,), tl.int32)
    if BY_LAG:
        o_first = tl.maximum(o_last - max_lag, 0)
    if not CAUSAL:
        o_last = tl.zeros((BM,), tl.int32) + n
    seen_bad = tl.load(p_count + o_last * num_heads, mask=inside, other=0)
    seen_bad = seen_bad - tl.load(p_count + o_first * num_heads, mask=inside, other=0)
    b_o = tl.where((seen_bad > 0)[:, None], float("nan"), b_o)
    o_v = i_v * BV + tl.arange(0, BV)
    mask = inside[:, None] & (o_v < WIDTH)[None, :]
    p_first = p_o + i0.to(tl.int64) * num_heads * WIDTH
    tl.store(p_first + o_m[:, None] * (num_heads * WIDTH) + o_v[None, :], b_o.to(p_o.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "length", "max_lag", "num_blocks", "q_batch", "q_head", "k_batch", "k_head", "v_batch", "v_head",
        "gate1_batch", "gate1_head", "gate2_batch", "gate2_head",
    ]
)  # fmt: skip
def readout_kernel(
    p_q, p_k, p_v, p_scale1, p_up1, p_gate1, p_z1, p_scale2, p_up2, p_gate2, p_z2, p_rho, p_count, p_o,
    p_blocks, p_valid,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    gate1_batch, gate1_token, gate1_head, gate2_batch, gate2_token, gate2_head,
    length, max_lag, num_blocks, num_heads,
    K: tl.constexpr, V: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr,
    GLU: tl.constexpr, BY_LAG: tl.constexpr, CAUSAL: tl.constexpr, HAS_BLOCKS: tl.constexpr, HOLES: tl.constexpr,
    SCALE1: tl.constexpr, GATED1: tl.constexpr, SCALE2: tl.constexpr, GATED2: tl.constexpr, NORM: tl.constexpr,
    PACKED: tl.constexpr, ASM: tl.constexpr, ACC: tl.constexpr, MIX: tl.constexpr, PRECISION: tl.constexpr,
    EARLY: tl.constexpr, ALIGNED: tl.constexpr, ALIGNED_VALUES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BR1: tl.constexpr, BR2: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """``o_i = sum_l w_i[l] v_{i-l} / rho_i`` of a head, ``[B, T, H, V]`` contiguous.

    ``EARLY`` divides the weights, not the output, by ``rho``: float16 would overflow.
    """
    NG: tl.constexpr = BM // BN if BY_LAG else 1
    LOW_RANK1: tl.constexpr = R1 > 0
    LOW_RANK2: tl.constexpr = R2 > 0
    i_b, i_h, start, n, i0 = locate(p_blocks, length, num_blocks, num_heads, HAS_BLOCKS, BM)
    if i0 >= n:
        return
    num_maps = num_heads * 2 if GLU else num_heads
    first_token = i_b * length + start
    p_qg = head_of(p_q, i_b, start, i_h, q_batch, q_token, q_head, ALIGNED)
    p_qs = head_of(p_q, i_b, start, i_h + num_heads, q_batch, q_token, q_head, ALIGNED)
    p_kg = head_of(p_k, i_b, start, i_h, k_batch, k_token, k_head, ALIGNED)
    p_ks = head_of(p_k, i_b, start, i_h + num_heads, k_batch, k_token, k_head, ALIGNED)
    p_vh = head_of(p_v, i_b, start, i_h, v_batch, v_token, v_head, ALIGNED_VALUES)
    p_scale1_gate = p_scale1 + i_h * max_lag
    p_scale1_scale = p_scale1_gate + tl.cast(num_heads, tl.int64) * max_lag
    p_up1_gate = p_up1 + i_h * max_lag * BR1
    p_up1_scale = p_up1_gate + tl.cast(num_heads, tl.int64) * max_lag * BR1
    p_scale = p_scale2 + i_h * max_lag
    p_up = p_up2 + i_h * max_lag * BR2
    p_hole = p_valid + first_token
    p_bad = p_count + (i_b * (length + 1) + start) * num_heads + i_h
    b_qg = load_rows(p_qg, i0, n, q_token, K, BM, BK)
    b_qs = b_qg
    b_wg = b_qg
    b_ws = b_qg
    b_w2 = b_qg
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
    if LOW_RANK2:
        p_z = p_z2 + (first_token * num_heads + i_h) * R2
        p_gate = head_of(p_gate2, i_b, start, i_h, gate2_batch, gate2_token, gate2_head, False)
        b_w2 = gated_statistic(
            p_z, p_gate, i0, n, num_heads * R2, gate2_token, 1.0, R2, GATED2, MIX, BM, NG, BR2
        )  # fmt: skip
    o_m = tl.arange(0, BM)
    inside = i0 + o_m < n
    o_row = ((first_token + i0) * num_heads + i_h) + o_m.to(tl.int64) * num_heads
    b_inverse = tl.full((BM,), 1.0, ACC)
    if NORM:
        b_inverse = 1.0 / tl.load(p_rho + o_row, mask=inside, other=1.0)
    t_first, t_stop = key_tiles(i0, n, max_lag, BY_LAG, CAUSAL, BM, BN)
    if BY_LAG:
        t_stop += 1

    b_anchor = tl.dot(b_qg, load_keys(p_kg, t_first, n, k_token, K, BN, BK), input_precision=PRECISION, out_dtype=ACC)
    b_index = rotation_index(b_anchor, BM, BN, ASM)
    current = tl.arange(0, BN)[None, :] <= (o_m % BN)[:, None]
    b_last_gate = tl.zeros((BM, BN), tl.int32 if PACKED else ACC)
    b_last_scale = b_last_gate
    b_last_weights = tl.zeros((BM, BN), ACC)
    b_o = tl.zeros((BM, BV), ACC)
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
        b_a = select(b_gate, b_scale, GLU, ASM)
        b_weights = mix(
            b_a, b_w2, p_scale, p_up, x0, max_lag, LN2 if GLU else 1.0, SCALE2, LOW_RANK2, PRECISION, NG, BN, BR2
        )  # fmt: skip
        b_weights = hide(b_weights, i0, t, n, max_lag, p_hole, BY_LAG, CAUSAL, HOLES, BM, BN)
        t_value = t
        if BY_LAG:
            t_value = t - 1
            b_turned_weights = rotate(tl.where(current, b_last_weights, b_weights), b_index, BM, BN)
            b_last_weights = b_weights
            b_weights = b_turned_weights
        if EARLY:
            b_weights = b_weights * b_inverse[:, None]
        b_v = load_values(p_vh, p_bad, t_value, tl.program_id(1), n, v_token, num_heads, V, BN, BV)
        b_o = tl.dot(b_weights.to(b_v.dtype), b_v, b_o, input_precision=PRECISION, out_dtype=ACC)

    if NORM and not EARLY:
        b_o = b_o * b_inverse[:, None]
    p_first = p_o + (first_token * num_heads + i_h) * V
    store_output(b_o, p_first, p_bad, i0, tl.program_id(1), n, max_lag, num_heads, V, BY_LAG, CAUSAL, BM, BV)
