"""Norms that a sum of squares does not hold: made again, in two units, where a row is that large or small."""

import triton
import triton.language as tl

from hypermlp_kernels.blocks import (
    LARGE,
    SMALL,
    gated_statistic,
    head_of,
    key_tiles,
    load_keys,
    load_rows,
    locate,
    mix,
    norm_of,
    score_columns,
)
from hypermlp_kernels.skew import rotation_index
from hypermlp_kernels.visibility import hide

# beyond these a sum of float32 squares loses digits, or all
_LEAST = tl.constexpr(2.0**-44)
_MOST = tl.constexpr(2.0**60)


@triton.jit(
    do_not_specialize=[
        "length", "max_lag", "num_blocks", "eps", "q_batch", "q_head", "k_batch", "k_head", "gate1_batch", "gate1_head",
    ]
)  # fmt: skip
def extreme_norms_kernel(
    p_q, p_k, p_scale1, p_up1, p_gate1, p_z1, p_rho, p_blocks, p_valid,
    q_batch, q_token, q_head, k_batch, k_token, k_head, gate1_batch, gate1_token, gate1_head,
    length, max_lag, num_blocks, num_heads, num_maps, eps,
    K: tl.constexpr, R1: tl.constexpr,
    BY_LAG: tl.constexpr, CAUSAL: tl.constexpr, HAS_BLOCKS: tl.constexpr, HOLES: tl.constexpr,
    SCALE1: tl.constexpr, GATED1: tl.constexpr, ALIGNED: tl.constexpr,
    ASM: tl.constexpr, ACC: tl.constexpr, MIX: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR1: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``rho`` ``[B, T, H]`` again where it is extreme: of nearly all blocks of rows it is only read."""
    NG: tl.constexpr = BM // BN if BY_LAG else 1
    LOW_RANK1: tl.constexpr = R1 > 0
    i_b, i_h, start, n, i0 = locate(p_blocks, length, num_blocks, num_heads, HAS_BLOCKS, BM)
    if i0 >= n:
        return
    first_token = i_b * length + start
    o_m = tl.arange(0, BM)
    o_row = ((first_token + i0) * num_heads + i_h) + o_m.to(tl.int64) * num_heads
    inside = i0 + o_m < n
    b_rho = tl.load(p_rho + o_row, mask=inside, other=1.0)
    extreme = (b_rho < _LEAST) | (b_rho > _MOST)
    if tl.max(extreme.to(tl.int32)) == 0:
        return
    p_qg = head_of(p_q, i_b, start, i_h, q_batch, q_token, q_head, ALIGNED)
    p_kg = head_of(p_k, i_b, start, i_h, k_batch, k_token, k_head, ALIGNED)
    p_scale = p_scale1 + i_h * max_lag
    p_up = p_up1 + i_h * max_lag * BR1
    p_hole = p_valid + first_token
    b_qg = load_rows(p_qg, i0, n, q_token, K, BM, BK)
    b_wg = b_qg
    if LOW_RANK1:
        p_z = p_z1 + (first_token * num_maps + i_h) * R1
        p_gate = head_of(p_gate1, i_b, start, i_h, gate1_batch, gate1_token, gate1_head, False)
        b_wg = gated_statistic(
            p_z, p_gate, i0, n, num_maps * R1, gate1_token, 1.0, R1, GATED1, MIX, BM, NG, BR1
        )  # fmt: skip
    t_first, t_stop = key_tiles(i0, n, max_lag, BY_LAG, CAUSAL, BM, BN)

    b_anchor = tl.dot(b_qg, load_keys(p_kg, t_first, n, k_token, K, BN, BK), input_precision=PRECISION, out_dtype=ACC)
    b_index = rotation_index(b_anchor, BM, BN, ASM)
    b_last = tl.zeros((BM, BN), ACC)
    b_small = tl.zeros((BM,), ACC)
    b_large = b_small
    for t in tl.range(t_first, t_stop, num_stages=STAGES):
        b_gate, _, b_last, _ = score_columns(
            b_qg, b_qg, p_kg, p_kg, t, n, k_token, b_index, b_last, b_last,
            K, False, BY_LAG, False, ASM, ACC, PRECISION, BM, BN, BK,
        )  # fmt: skip
        x0 = i0 - t * BN if BY_LAG else t * BN
        b_gate = mix(b_gate, b_wg, p_scale, p_up, x0, max_lag, 1.0, SCALE1, LOW_RANK1, PRECISION, NG, BN, BR1)
        b_gate = hide(b_gate, i0, t, n, max_lag, p_hole, BY_LAG, CAUSAL, HOLES, BM, BN)
        b_up = b_gate * (1.0 / SMALL)
        b_down = b_gate * (1.0 / LARGE)
        b_small += tl.sum(b_up * b_up, axis=1)
        b_large += tl.sum(b_down * b_down, axis=1)
    b_again = norm_of(b_small, b_large)
    tl.store(p_rho + o_row, tl.where(b_again <= eps, eps, b_again), mask=inside & extreme)
