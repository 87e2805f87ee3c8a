"""Backward, the score maps: the activated map again, and from the weights' gradient those of both score maps.

Programs own ``BM`` query rows of one head, as in ``backward_rows``.
"""

import triton
import triton.language as tl

from hypermlp_kernels.backward_blocks import locate_in_chunk, store_statistic_gradient, tile_offsets
from hypermlp_kernels.backward_parts import own_part, store_part
from hypermlp_kernels.blocks import (
    LN2,
    LOG2E,
    as_floats,
    gated_statistic,
    head_of,
    key_tiles,
    load_keys,
    load_rows,
    mix,
    pick_group,
    score_columns,
    softplus2,
    table_rows,
)
from hypermlp_kernels.skew import rotation_index
from hypermlp_kernels.visibility import hide_all


@triton.jit
def sigmoid2(b_u, ASM: tl.constexpr):
    """``1 / (1 + 2^-u)``: the sigmoid of an argument in units of ln 2."""
    if ASM:
        e = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [-tl.abs(b_u)], dtype=tl.float32, is_pure=True, pack=1
        )
        r = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + e], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        e = tl.exp2(-tl.abs(b_u))
        r = 1.0 / (1.0 + e)
    return tl.where(b_u >= 0, r, e * r)


@triton.jit(
    do_not_specialize=[
        "length", "max_lag", "num_rest", "last", "origin", "full", "most", "plane", "span",
        "q_batch", "q_head", "k_batch", "k_head", "gate1_batch", "gate1_head",
    ]
)  # fmt: skip
def map_gradient_kernel(
    p_q, p_k, p_scale1, p_up1, p_gate1, p_z1, p_scale2, p_down2, p_dz2, p_pull,
    p_planes, p_dz1, p_dgate1, p_blocks, p_valid,
    q_batch, q_token, q_head, k_batch, k_token, k_head, gate1_batch, gate1_token, gate1_head,
    length, max_lag, num_rest, num_heads, last, origin, full, most, plane, span,
    K: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr,
    GLU: tl.constexpr, BY_LAG: tl.constexpr, CAUSAL: tl.constexpr, HAS_BLOCKS: tl.constexpr, HOLES: tl.constexpr,
    SCALE1: tl.constexpr, GATED1: tl.constexpr, SCALE2: tl.constexpr,
    GRADIENT: tl.constexpr, GATE_GRADIENT: tl.constexpr, ACTIVATED: tl.constexpr, SPLIT: tl.constexpr,
    ALIGNED: tl.constexpr, PACKED: tl.constexpr, ASM: tl.constexpr,
    ACC: tl.constexpr, MIX: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR1: tl.constexpr, BR2: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The maps again: the activated one (``ACTIVATED``) and the gradients of the mixed ones (``GRADIENT``).

    Plane 0 of ``p_planes`` holds ``dw``; 1 gets ``a`` before the norm; 2 and 3 get ``dy`` of the gate and
    the scale map; they lie ``plane`` tiles apart. With ``dy`` come the gradients of the first mixing's ``z``
    and ``gate``, ``[B, T, maps, R1]``. ``p_scale1`` counts scale maps in units of 1 / ln 2. ``p_pull``
    ``[B, T, H]`` is what ``rho`` adds: ``dg = da softplus(u) [g > 0] - pull g``.

    Of a part of the rows (``SPLIT``): ``p_dz1`` is the scratch of ``backward_parts`` for the gradients of
    ``gate z``, and what is made of them is left to ``add_parts_kernel``.
    """
    NG: tl.constexpr = BM // BN if BY_LAG else 1
    LOW_RANK1: tl.constexpr = R1 > 0
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
    num_maps = num_heads * 2 if GLU else num_heads
    first_token = i_b * length + start
    p_qg = head_of(p_q, i_b, start, i_h, q_batch, q_token, q_head, ALIGNED)
    p_qs = head_of(p_q, i_b, start, i_h + num_heads, q_batch, q_token, q_head, ALIGNED)
    p_kg = head_of(p_k, i_b, start, i_h, k_batch, k_token, k_head, ALIGNED)
    p_ks = head_of(p_k, i_b, start, i_h + num_heads, k_batch, k_token, k_head, ALIGNED)
    next_plane = tl.cast(plane, tl.int64) * (BM * BN)
    scale_map = tl.cast(num_heads, tl.int64) * max_lag
    p_scale1_gate = p_scale1 + i_h * max_lag
    p_up1_gate = p_up1 + i_h * max_lag * BR1
    z1_offset = (first_token * num_maps + i_h) * R1
    p_gate1_gate = head_of(p_gate1, i_b, start, i_h, gate1_batch, gate1_token, gate1_head, False)
    p_gate1_scale = p_gate1_gate + num_heads * gate1_head
    p_hole = p_valid + first_token
    b_qg = load_rows(p_qg, i0, n, q_token, K, BM, BK)
    b_qs = b_qg
    b_wg = b_qg
    b_ws = b_qg
    b_dz2 = b_qg
    if GLU:
        b_qs = load_rows(p_qs, i0, n, q_token, K, BM, BK)
    if LOW_RANK1:
        b_wg = gated_statistic(
            p_z1 + z1_offset, p_gate1_gate, i0, n, num_maps * R1, gate1_token, 1.0, R1, GATED1, MIX, BM, NG, BR1
        )  # fmt: skip
        if GLU:
            b_ws = gated_statistic(
                p_z1 + z1_offset + num_heads * R1, p_gate1_scale, i0, n, num_maps * R1, gate1_token, LOG2E,
                R1, GATED1, MIX, BM, NG, BR1,
            )  # fmt: skip
    if GRADIENT:
        o_m = tl.arange(0, BM)
        o_row = (first_token + i0) * num_heads + i_h + o_m.to(tl.int64) * num_heads
        b_pull = tl.load(p_pull + o_row, mask=i0 + o_m < n, other=0.0)
        if R2 > 0:
            p_dz2_rows = p_dz2 + (first_token * num_heads + i_h) * R2
            b_dz2 = gated_statistic(
                p_dz2_rows, p_dz2_rows, i0, n, num_heads * R2, 0, 1.0, R2, False, MIX, BM, NG, BR2
            )  # fmt: skip

    b_anchor = tl.dot(b_qg, load_keys(p_kg, t_first, n, k_token, K, BN, BK), input_precision=PRECISION, out_dtype=ACC)
    b_index = rotation_index(b_anchor, BM, BN, ASM)
    b_last_gate = tl.zeros((BM, BN), tl.int32 if PACKED else ACC)
    b_last_scale = b_last_gate
    if SPLIT and BY_LAG:
        # before a row's first tile there is nothing: what is read in its place is hidden later
        _, _, b_last_gate, b_last_scale = score_columns(
            b_qg, b_qs, p_kg, p_ks, tl.maximum(t_first - 1, 0), n, k_token, b_index, b_last_gate, b_last_scale,
            K, GLU, BY_LAG, PACKED, ASM, ACC, PRECISION, BM, BN, BK,
        )  # fmt: skip
    b_dw_gate = tl.zeros((BM, NG * BR1), ACC)
    b_dw_scale = b_dw_gate
    for t in tl.range(t_first, t_stop, num_stages=STAGES):
        b_gate, b_scale, b_last_gate, b_last_scale = score_columns(
            b_qg, b_qs, p_kg, p_ks, t, n, k_token, b_index, b_last_gate, b_last_scale,
            K, GLU, BY_LAG, PACKED, ASM, ACC, PRECISION, BM, BN, BK,
        )  # fmt: skip
        x0 = i0 - t * BN if BY_LAG else t * BN
        p_tile = p_planes + tile_offsets(tile0 + t - t_first, BM, BN, BM)
        b_gate, b_scale = as_floats(b_gate, b_scale, PACKED)
        b_gate = mix(
            b_gate, b_wg, p_scale1_gate, p_up1_gate, x0, max_lag, 1.0, SCALE1, LOW_RANK1, PRECISION, NG, BN, BR1
        )
        if GLU:
            b_scale = mix(
                b_scale, b_ws, p_scale1_gate + scale_map, p_up1_gate + scale_map * BR1, x0, max_lag, LOG2E,
                SCALE1, LOW_RANK1, PRECISION, NG, BN, BR1,
            )  # fmt: skip
        b_dw = b_gate
        if GRADIENT:
            b_dw = tl.load(p_tile)
        b_gate, b_scale, b_dw = hide_all(
            b_gate, b_scale, b_dw, i0, t, n, max_lag, p_hole, BY_LAG, CAUSAL, HOLES, BM, BN
        )
        if GRADIENT:
            b_da = mix(
                b_dw.to(ACC), b_dz2, p_scale2 + i_h * max_lag, p_down2 + i_h * max_lag * BR2, x0, max_lag, 1.0,
                SCALE2, R2 > 0, PRECISION, NG, BN, BR2,
            )  # fmt: skip
        if GLU:
            b_softplus = softplus2(b_scale, ASM) * LN2
            b_sigmoid = sigmoid2(b_scale, ASM)
        if GRADIENT:
            b_dgate = tl.where(b_gate > 0, b_da, 0.0)
            if GLU:
                b_dscale = b_dgate * b_gate * b_sigmoid
                b_dgate = b_dgate * b_softplus
                b_dscale = b_dscale.to(p_planes.dtype.element_ty)
                tl.store(p_tile + next_plane * 3, b_dscale)
            b_dgate = (b_dgate - b_pull[:, None] * b_gate).to(p_planes.dtype.element_ty)
            tl.store(p_tile + next_plane * 2, b_dgate)
        if ACTIVATED:
            b_a = tl.maximum(b_gate, 0.0, propagate_nan=tl.PropagateNan.ALL)
            if GLU:
                b_a = b_a * b_softplus
            tl.store(p_tile + next_plane, b_a.to(p_planes.dtype.element_ty))
        if GRADIENT and LOW_RANK1:
            b_up = table_rows(p_up1_gate, x0, max_lag, NG, BN, BR1)
            b_dw_gate = tl.dot(b_dgate, b_up, b_dw_gate, input_precision=PRECISION, out_dtype=ACC)
            if GLU:
                b_up = table_rows(p_up1_gate + scale_map * BR1, x0, max_lag, NG, BN, BR1)
                b_dw_scale = tl.dot(b_dscale, b_up, b_dw_scale, input_precision=PRECISION, out_dtype=ACC)

    if GRADIENT and LOW_RANK1:
        b_dw_gate = pick_group(b_dw_gate, BM, NG, BR1)
        if GLU:
            b_dw_scale = pick_group(b_dw_scale, BM, NG, BR1)
        if SPLIT:
            store_part(p_dz1, b_dw_gate, 0, BM, BR1)
            if GLU:
                store_part(p_dz1, b_dw_scale, 1, BM, BR1)
        else:
            store_statistic_gradient(
                b_dw_gate, p_z1 + z1_offset, p_gate1_gate, p_dz1 + z1_offset, p_dgate1 + z1_offset,
                i0, n, num_maps * R1, gate1_token, R1, GATED1, GATE_GRADIENT, BM, BR1,
            )  # fmt: skip
            if GLU:
                z1_offset += num_heads * R1
                store_statistic_gradient(
                    b_dw_scale, p_z1 + z1_offset, p_gate1_scale, p_dz1 + z1_offset, p_dgate1 + z1_offset,
                    i0, n, num_maps * R1, gate1_token, R1, GATED1, GATE_GRADIENT, BM, BR1,
                )  # fmt: skip
