"""Backward, by key: maps turned from columns to keys, and their products with the rows' streams.

``dq = ds k`` is summed while a map's gradient is turned; ``dk = ds^T q`` and ``dv = weights^T do`` are
made by the programs that own the keys.
"""

import triton
import triton.language as tl

from hypermlp_kernels.backward_blocks import block_tiles, locate_in_chunk, tile_offsets
from hypermlp_kernels.backward_parts import own_part, store_part
from hypermlp_kernels.blocks import gated_statistic, head_of, key_tiles, load_rows, mix, place, table_rows
from hypermlp_kernels.skew import rotate, rotation_index
from hypermlp_kernels.visibility import hide


@triton.jit
def mixed_tile(
    p_x, b_w, p_scale, p_table, p_hole, i0, t, n, max_lag,
    SCALE: tl.constexpr, LOW_RANK: tl.constexpr, BY_LAG: tl.constexpr, CAUSAL: tl.constexpr, HOLES: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, NG: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """``x scale + w table^T`` of the tile at ``p_x``, in column order, zero where hidden."""
    b_x = tl.load(p_x).to(ACC)
    x0 = i0 - t * BN if BY_LAG else t * BN
    b_x = mix(b_x, b_w, p_scale, p_table, x0, max_lag, 1.0, SCALE, LOW_RANK, PRECISION, NG, BN, BR)
    return hide(b_x, i0, t, n, max_lag, p_hole, BY_LAG, CAUSAL, HOLES, BM, BN)


@triton.jit(
    do_not_specialize=[
        "length", "max_lag", "num_rest", "last", "origin", "full", "most", "plane", "span",
        "k_batch", "k_head", "gate_batch", "gate_head",
    ]
)  # fmt: skip
def turn_kernel(
    p_x, p_scale, p_table, p_z, p_gate, p_rho, p_k, p_out, p_dq, p_blocks, p_valid,
    k_batch, k_token, k_head, gate_batch, gate_token, gate_head,
    length, max_lag, num_rest, num_heads, num_maps, last, origin, full, most, plane, span,
    K: tl.constexpr, R: tl.constexpr, SCALE: tl.constexpr, GATED: tl.constexpr, WEIGHTS: tl.constexpr,
    QUERY_GRADIENT: tl.constexpr, SPLIT: tl.constexpr, ALIGNED: tl.constexpr,
    BY_LAG: tl.constexpr, CAUSAL: tl.constexpr, HAS_BLOCKS: tl.constexpr, HOLES: tl.constexpr,
    ASM: tl.constexpr, ACC: tl.constexpr, MIX: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``x scale + (gate z) table^T`` from a plane in column order to one by key, zero where hidden.

    The weights (``WEIGHTS``, divided by ``rho``), or a score map's gradient, whose product with the keys
    is ``p_dq`` ``[B, T, maps, K]``, or of a part of the rows (``SPLIT``) the scratch of ``backward_parts``. A
    program's score map is its third index; planes lie ``plane`` tiles apart.
    """
    NG: tl.constexpr = BM // BN if BY_LAG else 1
    i_b, i_h, start, n, i0, tile0 = locate_in_chunk(
        p_blocks, last, origin, length, num_rest, num_heads, full, most, HAS_BLOCKS, BM, BN
    )
    if i0 >= n:
        return
    i_map = i_h + tl.program_id(2) * num_heads
    p_x += tl.program_id(2).to(tl.int64) * plane * (BM * BN)
    p_out += tl.program_id(2).to(tl.int64) * plane * (BM * BN)
    first_token = i_b * length + start
    p_hole = p_valid + first_token
    p_scale += i_map * max_lag
    p_table += i_map * max_lag * BR
    p_keys = head_of(p_k, i_b, start, i_map, k_batch, k_token, k_head, ALIGNED)
    o_m = tl.arange(0, BM)
    t_first, t_end = key_tiles(i0, n, max_lag, BY_LAG, CAUSAL, BM, BN)
    tile0, t_first, t_stop = own_part(tile0, t_first, t_end, span, SPLIT)
    if SPLIT:  # noqa: SIM102  a compile-time branch
        if t_first >= t_stop:
            return

    b_next = tl.zeros((BM, BN), ACC)
    b_anchor = b_next
    b_w = b_next
    if R > 0:
        p_z_rows = p_z + (first_token * num_maps + i_map) * R
        p_gate_rows = head_of(p_gate, i_b, start, i_map, gate_batch, gate_token, gate_head, False)
        b_w = gated_statistic(
            p_z_rows, p_gate_rows, i0, n, num_maps * R, gate_token, 1.0, R, GATED, MIX, BM, NG, BR
        )  # fmt: skip
        b_table = tl.trans(table_rows(p_table, i0, max_lag, NG, BN, BR))
        b_anchor = tl.dot(b_w, b_table, input_precision=PRECISION, out_dtype=ACC)
    b_index = rotation_index(b_anchor, BM, BN, ASM)
    current = tl.arange(0, BN)[None, :] <= (o_m % BN)[:, None]
    b_inverse = tl.full((BM,), 1.0, ACC)
    if WEIGHTS:
        o_row = (first_token + i0) * num_heads + i_h + o_m.to(tl.int64) * num_heads
        b_inverse = 1.0 / tl.load(p_rho + o_row, mask=i0 + o_m < n, other=1.0)
    if SPLIT and BY_LAG:
        # after a row's last tile there is nothing
        t = tl.minimum(t_stop, t_end - 1)
        b_next = mixed_tile(
            p_x + tile_offsets(tile0 + t - t_first, BM, BN, BM), b_w, p_scale, p_table, p_hole, i0, t, n, max_lag,
            SCALE, R > 0, BY_LAG, CAUSAL, HOLES, ACC, PRECISION, NG, BM, BN, BR,
        )  # fmt: skip
        b_next = tl.where(t_stop < t_end, b_next, 0.0)
    b_dq = tl.zeros((BM, BK), ACC)
    for back in tl.range(0, t_stop - t_first, num_stages=STAGES):
        t = t_stop - 1 - back
        o_tile = tile_offsets(tile0 + t - t_first, BM, BN, BM)
        b_x = mixed_tile(
            p_x + o_tile, b_w, p_scale, p_table, p_hole, i0, t, n, max_lag,
            SCALE, R > 0, BY_LAG, CAUSAL, HOLES, ACC, PRECISION, NG, BM, BN, BR,
        )  # fmt: skip
        if BY_LAG:
            b_turned = rotate(tl.where(current, b_x, b_next), b_index, BM, BN)
            b_next = b_x
            b_x = b_turned
        if WEIGHTS:
            b_x = b_x * b_inverse[:, None]
        b_x = b_x.to(MIX)
        tl.store(p_out + o_tile, b_x)
        if QUERY_GRADIENT:
            b_k = load_rows(p_keys, t * BN, n, k_token, K, BN, BK)
            b_dq = tl.dot(b_x, b_k.to(MIX), b_dq, input_precision=PRECISION, out_dtype=ACC)
    if QUERY_GRADIENT:
        if SPLIT:
            store_part(p_dq, b_dq, tl.program_id(2), BM, BK)
        else:
            o_k = tl.arange(0, BK)
            p_out_rows = p_dq + ((first_token + i0) * num_maps + i_map) * K
            p_out_rows = p_out_rows + o_m.to(tl.int64)[:, None] * num_maps * K + o_k[None, :]
            tl.store(p_out_rows, b_dq, mask=(i0 + o_m < n)[:, None] & (o_k < K)[None, :])


@triton.jit(
    do_not_specialize=[
        "length", "max_lag", "num_rest", "first", "stop", "origin", "full", "most", "plane", "y_batch", "y_head",
    ]
)  # fmt: skip
def key_product_kernel(
    p_x, p_y, p_out, p_blocks,
    y_batch, y_token, y_head,
    length, max_lag, num_rest, num_heads, num_maps, first, stop, origin, full, most, plane,
    WIDTH: tl.constexpr, BY_LAG: tl.constexpr, CAUSAL: tl.constexpr, HAS_BLOCKS: tl.constexpr, ALIGNED: tl.constexpr,
    ACC: tl.constexpr, MIX: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds ``sum_i x_i[j] y_i`` over the chunk's rows to ``p_out`` ``[B, T, maps, WIDTH]``, float32.

    ``x`` is in a plane by key. A program owns a block of ``BM`` keys of a map (its second index) and ``BW`` channels;
    blocks of channels run side by side, and so they read ``x`` from memory once.
    """
    WIDTH_BLOCKS: tl.constexpr = (WIDTH + BW - 1) // BW
    i_w = tl.program_id(0) % WIDTH_BLOCKS
    i_rest = tl.program_id(0) // WIDTH_BLOCKS % num_rest
    i_block = tl.program_id(0) // WIDTH_BLOCKS // num_rest
    i_b, i_h, start, n, j0 = place(p_blocks, i_block, i_rest, length, num_heads, HAS_BLOCKS, BM)
    i_map = i_h + tl.program_id(1) * num_heads
    p_x += tl.program_id(1).to(tl.int64) * plane * (BM * BN)
    # of the rows that see the keys, those in the chunk
    of_sequence = i_block - j0 // BM
    row_stop = n
    if BY_LAG:
        row_stop = tl.minimum(n, j0 + BM - 1 + max_lag)
    i_first = tl.maximum(i_block if CAUSAL else of_sequence, tl.cdiv(first - i_rest, num_rest))
    i_stop = tl.minimum(of_sequence + tl.cdiv(row_stop, BM), tl.cdiv(stop - i_rest, num_rest))
    if (j0 >= n) | (i_first >= i_stop):
        return
    first_token = i_b * length + start
    o_m = tl.arange(0, BM)
    o_w = i_w * BW + tl.arange(0, BW)
    p_rows = head_of(p_y, i_b, start, i_map, y_batch, y_token, y_head, ALIGNED) + i_w * BW
    b_out = tl.zeros((BM, BW), ACC)
    o_tile = o_m // BN
    o_key = o_tile * (BM * BN) + o_m % BN
    for i_row in tl.range(i_first, i_stop, num_stages=STAGES):
        i0 = (i_row - of_sequence) * BM
        t_first, t_stop = key_tiles(i0, n, max_lag, BY_LAG, CAUSAL, BM, BN)
        t = j0 // BN - t_first
        tile = block_tiles(i_row, i_rest, origin, num_rest, full, most, BM // BN) + t
        # the first of the block's tiles may lie before the rows' window, the last past the sequence
        kept = (t + o_tile >= 0) & (t + o_tile < t_stop - t_first)
        b_x = tl.load(p_x + tile * (BM * BN) + o_m[:, None] * BN + o_key[None, :], mask=kept[None, :], other=0.0)
        p_tile = p_rows + i0.to(tl.int64) * y_token + o_m[:, None] * y_token + tl.arange(0, BW)[None, :]
        b_y = tl.load(p_tile, mask=(i0 + o_m < n)[:, None] & (o_w < WIDTH)[None, :], other=0.0)
        b_out = tl.dot(tl.trans(b_x), b_y.to(MIX), b_out, input_precision=PRECISION, out_dtype=ACC)
    p_own = p_out + ((first_token + j0) * num_maps + i_map) * WIDTH
    p_own = p_own + o_m.to(tl.int64)[:, None] * num_maps * WIDTH + o_w[None, :]
    owned = (j0 + o_m < n)[:, None] & (o_w < WIDTH)[None, :]
    tl.store(p_own, b_out + tl.load(p_own, mask=owned), mask=owned)
