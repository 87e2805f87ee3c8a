"""Backward, by key: maps turned from columns to keys, and their products with the rows' streams.

``dq = ds k`` is summed while a map's gradient is turned; ``dk = ds^T q`` and ``dv = weights^T do`` are
made by the programs that own the keys.
"""

import triton
import triton.language as tl

from hypermlp_kernels.backward_blocks import Planes, block_tiles, locate_in_chunk, tile_offsets
from hypermlp_kernels.backward_parts import part_of, store_part
from hypermlp_kernels.blocks import (
    Stream,
    compact_head,
    first_column,
    from_row,
    head_of,
    inverse_norm,
    key_tiles,
    load_rows,
    place,
    store_rows,
)
from hypermlp_kernels.mixing import mix, mixing_index, mixing_of
from hypermlp_kernels.skew import rotate
from hypermlp_kernels.visibility import hide


@triton.jit
def mixed_tile(p_x, mixing, t, rows, p_valid, C: tl.constexpr, M: tl.constexpr):
    """``x scale + w table^T`` of the tile at ``p_x``, in column order, zero where hidden."""
    b_x = mix(tl.load(p_x).to(C.ACC), mixing, first_column(t, rows, C), rows.max_lag, 1.0, C, M)
    return hide(b_x, t, rows, p_valid, C)


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
    WEIGHTS: tl.constexpr, QUERY_GRADIENT: tl.constexpr, SPLIT: tl.constexpr, ALIGNED: tl.constexpr,
    C: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """``x scale + (gate z) table^T`` from a plane in column order to one by key, zero where hidden.

    The weights (``WEIGHTS``, divided by ``rho``), or a score map's gradient, whose product with the keys
    is ``p_dq`` ``[B, T, maps, K]``, or of a part of the rows (``SPLIT``) the scratch of ``backward_parts``. A
    program's score map is its third index; planes lie ``plane`` tiles apart.
    """
    BM: tl.constexpr = C.BM
    BN: tl.constexpr = C.BN
    BK: tl.constexpr = C.BK
    planes = Planes(num_rest, origin, full, most)
    rows, tile0 = locate_in_chunk(p_blocks, last, planes, length, max_lag, num_heads, C)
    if rows.i0 >= rows.n:
        return
    part = part_of(rows, tile0, span, SPLIT, C)
    if SPLIT:  # noqa: SIM102  a compile-time branch
        if part.t_first >= part.t_stop:
            return
    i_map = rows.i_h + tl.program_id(2) * num_heads
    p_x += tl.program_id(2).to(tl.int64) * plane * (BM * BN)
    p_out += tl.program_id(2).to(tl.int64) * plane * (BM * BN)
    keys = head_of(Stream(p_k, k_batch, k_token, k_head), rows, i_map, ALIGNED)
    gate = Stream(p_gate, gate_batch, gate_token, gate_head)
    mixing = mixing_of(p_scale, p_table, p_z, gate, i_map, num_maps, 1.0, rows, C, M)
    b_index = mixing_index(mixing, rows.i0, max_lag, C.ASM, C, M)
    b_inverse = tl.full((BM,), 1.0, C.ACC)
    if WEIGHTS:
        b_inverse = inverse_norm(p_rho, rows, C)
    b_next = tl.zeros((BM, BN), C.ACC)
    if SPLIT and C.BY_LAG:
        # after a row's last tile there is nothing
        t = tl.minimum(part.t_stop, part.t_end - 1)
        p_tile = p_x + tile_offsets(part.tile0 + t - part.t_first, C.BM, C.BN, C.BM)
        b_next = mixed_tile(p_tile, mixing, t, rows, p_valid, C, M)
        b_next = tl.where(part.t_stop < part.t_end, b_next, 0.0)
    b_dq = tl.zeros((BM, BK), C.ACC)
    for back in tl.range(0, part.t_stop - part.t_first, num_stages=C.STAGES):
        t = part.t_stop - 1 - back
        o_tile = tile_offsets(part.tile0 + t - part.t_first, C.BM, C.BN, C.BM)
        b_x = mixed_tile(p_x + o_tile, mixing, t, rows, p_valid, C, M)
        if C.BY_LAG:
            b_turned = rotate(b_x, b_next, b_index, C.BM, C.BN)
            b_next = b_x
            b_x = b_turned
        if WEIGHTS:
            b_x = b_x * b_inverse[:, None]
        b_x = b_x.to(C.MIX)
        tl.store(p_out + o_tile, b_x)
        if QUERY_GRADIENT:
            b_k = load_rows(keys, t * BN, rows.n, C.K, C.BN, C.BK)
            b_dq = tl.dot(b_x, b_k.to(C.MIX), b_dq, input_precision=C.PRECISION, out_dtype=C.ACC)
    if QUERY_GRADIENT:
        if SPLIT:
            store_part(p_dq, b_dq, tl.program_id(2), C.BM, C.BK)
        else:
            dq = compact_head(p_dq, rows, i_map, num_maps, C.K)
            store_rows(dq, b_dq, rows.i0, rows.n, C.K, C.BM, C.BK)


@triton.jit(
    do_not_specialize=[
        "length", "max_lag", "num_rest", "first", "stop", "origin", "full", "most", "plane", "y_batch", "y_head",
    ]
)  # fmt: skip
def key_product_kernel(
    p_x, p_y, p_out, p_blocks,
    y_batch, y_token, y_head,
    length, max_lag, num_rest, num_heads, num_maps, first, stop, origin, full, most, plane,
    WIDTH: tl.constexpr, BW: tl.constexpr, ALIGNED: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Adds ``sum_i x_i[j] y_i`` over the chunk's rows to ``p_out`` ``[B, T, maps, WIDTH]``, float32.

    ``x`` is in a plane by key. A program owns a block of ``BM`` keys of a map (its second index) and ``BW`` channels;
    blocks of channels run side by side, and so they read ``x`` from memory once.
    """
    BM: tl.constexpr = C.BM
    BN: tl.constexpr = C.BN
    WIDTH_BLOCKS: tl.constexpr = (WIDTH + BW - 1) // BW
    i_w = tl.program_id(0) % WIDTH_BLOCKS
    i_rest = tl.program_id(0) // WIDTH_BLOCKS % num_rest
    i_block = tl.program_id(0) // WIDTH_BLOCKS // num_rest
    keys = place(p_blocks, i_block, i_rest, length, max_lag, num_heads, C.BM, C)
    j0, n = keys.i0, keys.n
    i_map = keys.i_h + tl.program_id(1) * num_heads
    p_x += tl.program_id(1).to(tl.int64) * plane * (BM * BN)
    # of the rows that see the keys, those in the chunk
    of_sequence = i_block - j0 // BM
    row_stop = n
    if C.BY_LAG:
        row_stop = tl.minimum(n, j0 + BM - 1 + max_lag)
    i_first = tl.maximum(i_block if C.CAUSAL else of_sequence, tl.cdiv(first - i_rest, num_rest))
    i_stop = tl.minimum(of_sequence + tl.cdiv(row_stop, BM), tl.cdiv(stop - i_rest, num_rest))
    if (j0 >= n) | (i_first >= i_stop):
        return
    o_m = tl.arange(0, BM)
    o_w = i_w * BW + tl.arange(0, BW)
    p_rows = head_of(Stream(p_y, y_batch, y_token, y_head), keys, i_map, ALIGNED).p + i_w * BW
    b_out = tl.zeros((BM, BW), C.ACC)
    o_tile = o_m // BN
    o_key = o_tile * (BM * BN) + o_m % BN
    for i_row in tl.range(i_first, i_stop, num_stages=C.STAGES):
        i0 = (i_row - of_sequence) * BM
        t_first, t_stop = key_tiles(from_row(keys, i0), C)
        t = j0 // BN - t_first
        tile = block_tiles(i_row, i_rest, Planes(num_rest, origin, full, most), BM // BN) + t
        # the first of the block's tiles may lie before the rows' window, the last past the sequence
        kept = (t + o_tile >= 0) & (t + o_tile < t_stop - t_first)
        b_x = tl.load(p_x + tile * (BM * BN) + o_m[:, None] * BN + o_key[None, :], mask=kept[None, :], other=0.0)
        p_tile = p_rows + i0.to(tl.int64) * y_token + o_m[:, None] * y_token + tl.arange(0, BW)[None, :]
        b_y = tl.load(p_tile, mask=(i0 + o_m < n)[:, None] & (o_w < WIDTH)[None, :], other=0.0)
        b_out = tl.dot(tl.trans(b_x), b_y.to(C.MIX), b_out, input_precision=C.PRECISION, out_dtype=C.ACC)
    own = compact_head(p_out, keys, i_map, num_maps, WIDTH)
    p_own = own.p + j0.to(tl.int64) * own.token + o_m[:, None] * own.token + o_w[None, :]
    owned = (j0 + o_m < n)[:, None] & (o_w < WIDTH)[None, :]
    tl.store(p_own, b_out + tl.load(p_own, mask=owned), mask=owned)
