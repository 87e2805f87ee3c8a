"""One new token against cached ones, in three phases split over the slots of the cache.

    scores      s[j] = q . k[j]                                    and each split's part of z1
    selection   a[j] from s[j] and z1                              and each split's part of rho^2 and z2
    readout     each split's part of o, from a[j], z2 and rho      and a last kernel that adds these parts

A cached token's key is read in the first phase and its value in the third, once. Between the two there are a few
numbers a token. With one query there is no skew: the lags of neighbouring slots are neighbours.
"""

import triton
import triton.language as tl

from hypermlp_kernels.selection import LARGE, LN2, LOG2E, SMALL, norm_of, select
from hypermlp_kernels.slots import (
    extent,
    load_start,
    load_table,
    load_tile,
    row_and_split,
    share,
    table_rows,
    tile_slots,
)


@triton.jit
def summed(p_parts, num_splits, R: tl.constexpr, ACC: tl.constexpr, BS: tl.constexpr, BR: tl.constexpr):
    """The sum over splits of ``[num_splits, R]``, ``[BR]``: in one order, whoever adds."""
    o_r = tl.arange(0, BR)
    b_sum = tl.zeros((BS, BR), ACC)
    for i in range(0, num_splits, BS):
        o_s = i + tl.arange(0, BS)
        inside = (o_s < num_splits)[:, None] & (o_r < R)[None, :]
        b_sum += tl.load(p_parts + o_s[:, None] * R + o_r[None, :], mask=inside, other=0.0)
    return tl.sum(b_sum, axis=0)


@triton.jit
def gated_statistic(
    p_parts, p_gate, num_splits,
    R: tl.constexpr, GATED: tl.constexpr, ACC: tl.constexpr, BS: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """``gate * z`` of a head, ``[BR]``, from the splits' parts of ``z``."""
    b_w = summed(p_parts, num_splits, R, ACC, BS, BR)
    if GATED:
        o_r = tl.arange(0, BR)
        b_w = b_w * tl.load(p_gate + o_r, mask=o_r < R, other=0.0).to(ACC)
    return b_w


@triton.jit
def mix(
    b_x, b_w, p_diag, p_up, o_row, seen, up_row,
    DIAG: tl.constexpr, IDENTITY: tl.constexpr, R: tl.constexpr, ACC: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """``x (identity + diag) + w up^T`` of a tile of slots, ``[BN]``, zero where unseen."""
    b_y = b_x if IDENTITY else b_x * 0.0
    if DIAG:
        b_y += b_x * tl.load(p_diag + o_row, mask=seen, other=0.0).to(ACC)
    if R > 0:
        b_y += tl.sum(load_table(p_up, o_row, seen, up_row, R, BR).to(ACC) * b_w[None, :], axis=1)
    return tl.where(seen, b_y, 0.0)


@triton.jit
def score_tile(
    b_q, p_k, p_down, p_s, b_z, x0, o_slot, inside, full, o_row, seen, k_slot, k_width, down_row,
    K: tl.constexpr, R: tl.constexpr, SLOTS_LAST: tl.constexpr, ACC: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Store one score map's tile; ``z`` with what it adds."""
    b_k = load_tile(p_k, x0, inside, full, seen, k_slot, k_width, 0, K, SLOTS_LAST, BN, BK)
    b_s = tl.sum(b_k.to(ACC) * b_q[None, :], axis=1)
    tl.store(p_s + o_slot, b_s, mask=inside)
    if R > 0:
        # replaced, since an infinite query makes NaN of a hidden key's zeros
        b_s = tl.where(seen, b_s, 0.0)
        b_z += b_s[:, None] * load_table(p_down, o_row, seen, down_row, R, BR).to(ACC)
    return b_z


@triton.jit(
    do_not_specialize=["valid_batch", "older", "slots", "skip", "num_splits", "num_heads", "batch", "max_lag"],
    do_not_specialize_on_alignment=["p_valid"],
)
def decode_scores_kernel(
    p_q, p_older, p_newer, p_down, p_valid, p_start, p_length, p_s, p_z,
    q_batch, q_head, k_batch, k_head, k_slot, k_width, down_head, down_row, valid_batch, valid_slot,
    older, slots, skip, num_splits, num_heads, batch, max_lag,
    K: tl.constexpr, R: tl.constexpr, GLU: tl.constexpr,
    BY_LAG: tl.constexpr, RING: tl.constexpr, HOLES: tl.constexpr, SLOTS_LAST: tl.constexpr, ACC: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """``s`` ``[B, S*H, slots]`` and the parts of ``z1`` ``[B, S*H, splits, R]``, of one head's maps and one split."""
    i_b, i_h, i_split = row_and_split(num_heads, batch)
    num_maps = num_heads * 2 if GLU else num_heads
    older, filled, newest = extent(p_length, older, slots, RING)
    t_first, t_stop, tiles_older = share(older, filled, skip, num_splits, BN)
    start = load_start(p_start, i_b, BY_LAG)
    p_hole = p_valid + i_b * valid_batch
    o_k = tl.arange(0, BK)
    p_qg = p_q + i_b * q_batch + i_h * q_head + o_k
    b_qg = tl.load(p_qg, mask=o_k < K, other=0.0).to(ACC)
    b_qs = b_qg
    if GLU:
        b_qs = tl.load(p_qg + num_heads * q_head, mask=o_k < K, other=0.0).to(ACC)
    first_key = i_b * k_batch + i_h * k_head
    scale_keys = tl.cast(num_heads, tl.int64) * k_head
    p_down_gate = p_down + i_h * down_head
    p_down_scale = p_down_gate + tl.cast(num_heads, tl.int64) * down_head
    p_s_gate = p_s + (i_b * num_maps + i_h) * slots
    p_s_scale = p_s_gate + tl.cast(num_heads, tl.int64) * slots
    b_zg = tl.zeros((BN, BR), ACC)
    b_zs = b_zg
    for t in range(t_first, t_stop):
        newer, x0, o_slot, inside, full = tile_slots(t, tiles_older, older, filled, skip, BN)
        o_row, seen = table_rows(o_slot, inside, newest, slots, max_lag, start, p_hole, valid_slot, BY_LAG, HOLES)
        p_k = tl.where(newer, p_newer, p_older) + first_key
        b_zg = score_tile(
            b_qg, p_k, p_down_gate, p_s_gate, b_zg, x0, o_slot, inside, full, o_row, seen, k_slot, k_width, down_row,
            K, R, SLOTS_LAST, ACC, BN, BK, BR,
        )  # fmt: skip
        if GLU:
            b_zs = score_tile(
                b_qs, p_k + scale_keys, p_down_scale, p_s_scale, b_zs, x0, o_slot, inside, full, o_row, seen,
                k_slot, k_width, down_row, K, R, SLOTS_LAST, ACC, BN, BK, BR,
            )  # fmt: skip
    if R > 0:
        o_r = tl.arange(0, BR)
        p_out = p_z + ((i_b * num_maps + i_h) * num_splits + i_split) * R + o_r
        tl.store(p_out, tl.sum(b_zg, axis=0), mask=o_r < R)
        if GLU:
            p_out += tl.cast(num_heads, tl.int64) * num_splits * R
            tl.store(p_out, tl.sum(b_zs, axis=0), mask=o_r < R)


@triton.jit(
    do_not_specialize=["valid_batch", "older", "slots", "num_splits", "num_heads", "batch", "max_lag"],
    do_not_specialize_on_alignment=["p_valid"],
)
def decode_selection_kernel(
    p_s, p_z1, p_diag, p_up, p_gate, p_down, p_valid, p_start, p_length, p_a, p_square, p_z2,
    diag_head, up_head, up_row, gate_batch, gate_head, down_head, down_row, valid_batch, valid_slot,
    older, slots, num_splits, num_heads, batch, max_lag,
    R1: tl.constexpr, R2: tl.constexpr, GLU: tl.constexpr,
    BY_LAG: tl.constexpr, RING: tl.constexpr, HOLES: tl.constexpr,
    DIAG: tl.constexpr, IDENTITY: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr,
    ASM: tl.constexpr, ACC: tl.constexpr,
    BN: tl.constexpr, BS: tl.constexpr, BR1: tl.constexpr, BR2: tl.constexpr,
):  # fmt: skip
    """``a`` ``[B, H, slots]`` before the norm; parts of ``rho^2`` ``[B, H, splits, 2]`` and of ``z2`` ``[.., R]``."""
    i_b, i_h, i_split = row_and_split(num_heads, batch)
    num_maps = num_heads * 2 if GLU else num_heads
    i_map = i_b * num_maps + i_h
    i_row = i_b * num_heads + i_h
    scale_map = tl.cast(num_heads, tl.int64)
    older, filled, newest = extent(p_length, older, slots, RING)
    t_first, t_stop, tiles_older = share(older, filled, 0, num_splits, BN)
    start = load_start(p_start, i_b, BY_LAG)
    p_hole = p_valid + i_b * valid_batch
    p_diag += i_h * diag_head
    p_up += i_h * up_head
    p_down += i_h * down_head
    b_wg = tl.zeros((BR1,), ACC)
    b_ws = b_wg
    if R1 > 0:
        p_parts = p_z1 + i_map * num_splits * R1
        p_gate += i_b * gate_batch + i_h * gate_head
        b_wg = gated_statistic(p_parts, p_gate, num_splits, R1, GATED, ACC, BS, BR1)
        if GLU:
            p_parts += scale_map * num_splits * R1
            b_ws = gated_statistic(p_parts, p_gate + scale_map * gate_head, num_splits, R1, GATED, ACC, BS, BR1)
    b_small = tl.zeros((BN,), ACC)
    b_large = b_small
    b_z = tl.zeros((BN, BR2), ACC)
    for t in range(t_first, t_stop):
        _, _, o_slot, inside, _ = tile_slots(t, tiles_older, older, filled, 0, BN)
        o_row, seen = table_rows(o_slot, inside, newest, slots, max_lag, start, p_hole, valid_slot, BY_LAG, HOLES)
        p_tile = p_s + i_map * slots + o_slot
        b_gate = tl.load(p_tile, mask=seen, other=0.0)
        b_gate = mix(b_gate, b_wg, p_diag, p_up, o_row, seen, up_row, DIAG, IDENTITY, R1, ACC, BR1)
        b_scale = b_gate
        if GLU:
            b_scale = tl.load(p_tile + scale_map * slots, mask=seen, other=0.0)
            b_scale = mix(
                b_scale, b_ws, p_diag + scale_map * diag_head, p_up + scale_map * up_head, o_row, seen, up_row,
                DIAG, IDENTITY, R1, ACC, BR1,
            )  # fmt: skip
        b_a = select(b_gate, b_scale * LOG2E, GLU, True, ASM)
        # a score of minus infinity selects nothing: NaN, made of zero times infinity, stays one
        b_a = b_a + b_gate * 0.0
        if GLU:
            b_a = b_a * LN2 + b_scale * 0.0
        tl.store(p_a + i_row * slots + o_slot, b_a, mask=inside)
        if NORM:
            b_up = b_gate * (1.0 / SMALL)
            b_down = b_gate * (1.0 / LARGE)
            b_small += b_up * b_up
            b_large += b_down * b_down
        if R2 > 0:
            b_z += b_a[:, None] * load_table(p_down, o_row, seen, down_row, R2, BR2).to(ACC)
    i_part = i_row * num_splits + i_split
    if NORM:
        tl.store(p_square + i_part * 2, tl.sum(b_small, axis=0))
        tl.store(p_square + i_part * 2 + 1, tl.sum(b_large, axis=0))
    if R2 > 0:
        o_r = tl.arange(0, BR2)
        tl.store(p_z2 + i_part * R2 + o_r, tl.sum(b_z, axis=0), mask=o_r < R2)


@triton.jit(
    do_not_specialize=["valid_batch", "older", "slots", "skip", "num_splits", "num_heads", "batch", "max_lag", "eps"],
    do_not_specialize_on_alignment=["p_valid"],
)
def decode_readout_kernel(
    p_a, p_square, p_z2, p_diag, p_up, p_gate, p_older, p_newer, p_valid, p_start, p_length, p_o,
    diag_head, up_head, up_row, gate_batch, gate_head, v_batch, v_head, v_slot, v_width, valid_batch, valid_slot,
    older, slots, skip, num_splits, num_heads, batch, max_lag, eps,
    V: tl.constexpr, R: tl.constexpr,
    BY_LAG: tl.constexpr, RING: tl.constexpr, HOLES: tl.constexpr, SLOTS_LAST: tl.constexpr,
    DIAG: tl.constexpr, IDENTITY: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr,
    BN: tl.constexpr, BS: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The parts of ``o`` ``[B, H, splits, V]``: one split, and one block of channels, of one head."""
    i_b, i_h, i_split = row_and_split(num_heads, batch)
    i_row = i_b * num_heads + i_h
    v0 = tl.program_id(2) * BV
    older, filled, newest = extent(p_length, older, slots, RING)
    t_first, t_stop, tiles_older = share(older, filled, skip, num_splits, BN)
    start = load_start(p_start, i_b, BY_LAG)
    p_hole = p_valid + i_b * valid_batch
    p_diag += i_h * diag_head
    p_up += i_h * up_head
    b_w = tl.zeros((BR,), ACC)
    if R > 0:
        p_gate += i_b * gate_batch + i_h * gate_head
        b_w = gated_statistic(p_z2 + i_row * num_splits * R, p_gate, num_splits, R, GATED, ACC, BS, BR)
    rho = 1.0
    if NORM:
        b_squares = summed(p_square + i_row * num_splits * 2, num_splits, 2, ACC, BS, 2)
        first = tl.arange(0, 2) == 0
        rho = norm_of(tl.sum(tl.where(first, b_squares, 0.0)), tl.sum(tl.where(first, 0.0, b_squares)))
        # a comparison that a NaN fails: it must reach the output
        rho = tl.where(rho <= eps, eps, rho)
    first_value = i_b * v_batch + i_h * v_head
    b_o = tl.zeros((BN, BV), ACC)
    for t in range(t_first, t_stop):
        newer, x0, o_slot, inside, full = tile_slots(t, tiles_older, older, filled, skip, BN)
        o_row, seen = table_rows(o_slot, inside, newest, slots, max_lag, start, p_hole, valid_slot, BY_LAG, HOLES)
        p_v = tl.where(newer, p_newer, p_older) + first_value
        b_v = load_tile(p_v, x0, inside, full, seen, v_slot, v_width, v0, V, SLOTS_LAST, BN, BV)
        b_a = tl.load(p_a + i_row * slots + o_slot, mask=seen, other=0.0)
        b_a = mix(b_a, b_w, p_diag, p_up, o_row, seen, up_row, DIAG, IDENTITY, R, ACC, BR) / rho
        b_o += b_a[:, None] * b_v.to(ACC)
    o_v = v0 + tl.arange(0, BV)
    tl.store(p_o + (i_row * num_splits + i_split) * V + o_v, tl.sum(b_o, axis=0), mask=o_v < V)


@triton.jit(do_not_specialize=["num_splits"])
def decode_sum_kernel(p_parts, p_o, num_splits, V: tl.constexpr, ACC: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr):
    """``o`` ``[B, H, V]`` from the splits' parts."""
    i_row = tl.program_id(0).to(tl.int64)
    v0 = tl.program_id(1) * BV
    o_v = v0 + tl.arange(0, BV)
    b_o = tl.zeros((BS, BV), ACC)
    for i in range(0, num_splits, BS):
        o_s = i + tl.arange(0, BS)
        inside = (o_s < num_splits)[:, None] & (o_v < V)[None, :]
        b_o += tl.load(p_parts + (i_row * num_splits + o_s[:, None]) * V + o_v[None, :], mask=inside, other=0.0)
    tl.store(p_o + i_row * V + o_v, tl.sum(b_o, axis=0).to(p_o.dtype.element_ty), mask=o_v < V)
