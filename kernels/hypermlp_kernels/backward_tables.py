"""Backward, along columns: the gradients of a mixing's tables.

A program owns ``BN`` table rows (a lag window, or a key tile by position) of one map and walks the
query rows of the chunk, so every element has one owner and a fixed order of summation.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from hypermlp_kernels.backward_blocks import Planes, block_tiles, tile_offsets
from hypermlp_kernels.blocks import (
    Head,
    Stream,
    compact_head,
    from_row,
    head_of,
    key_tiles,
    load_keys,
    load_rows,
    place,
)
from hypermlp_kernels.mixing import gated_statistic
from hypermlp_kernels.skew import rotate, rotation_index
from hypermlp_kernels.visibility import hide


class Sums(NamedTuple):
    """A program's part of the gradients of ``diag``, by rows that are added up last, ``down`` and ``up``."""

    diag: tl.tensor
    down: tl.tensor
    up: tl.tensor


@triton.jit
def scores_of_window(b_q, k, t, n, b_index, C: tl.constexpr):
    """Scores in column order, alone: by lag they come from two key tiles, selected before one rotation."""
    b_keys = load_keys(k, t, n, C.K, C.BN, C.BK)
    b_s = tl.dot(b_q, b_keys, input_precision=C.PRECISION, out_dtype=C.ACC)
    if C.BY_LAG:
        # before the first tile there is nothing: what is read in its place is hidden later
        b_keys = load_keys(k, tl.maximum(t - 1, 0), n, C.K, C.BN, C.BK)
        b_other = tl.dot(b_q, b_keys, input_precision=C.PRECISION, out_dtype=C.ACC)
        b_s = rotate(b_s, b_other, b_index, C.BM, C.BN)
    return b_s


@triton.jit
def sum_rows(b_x, ROWS: tl.constexpr, BN: tl.constexpr):
    """Column sums as far as a dot's result has them in one thread, ``[ROWS / 2, BN]``."""
    return tl.reshape(tl.sum(tl.reshape(b_x, (ROWS // 16, 2, 8, BN)), axis=1), (ROWS // 2, BN))


@triton.jit
def add_tile(
    sums, q, k, p_x, p_dy, z, gate, dz, p_valid, b_index, t, rows,
    SCORES: tl.constexpr, NEEDS: tl.constexpr, C: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """One tile's part of :func:`table_gradient_kernel`, whose maps ``p_x`` and ``p_dy`` point at, of heads."""
    b_ddiag, b_ddown, b_dup = sums.diag, sums.down, sums.up
    b_dy = tl.load(p_dy)
    if SCORES:
        b_q = load_rows(q, rows.i0, rows.n, C.K, C.BM, C.BK)
        b_x = scores_of_window(b_q, k, t, rows.n, b_index, C)
        b_x = hide(b_x, t, rows, p_valid, C)
    else:
        b_dy = hide(b_dy, t, rows, p_valid, C)
        b_x = b_dy
        if NEEDS.diag or NEEDS.down:
            b_x = tl.load(p_x)
    if NEEDS.diag:
        b_product = b_x.to(C.ACC) * b_dy.to(C.ACC)
        b_ddiag += sum_rows(b_product, C.BM, C.BN) if SCORES else b_product
    if NEEDS.down:
        b_dz = gated_statistic(dz, dz, rows, 1.0, False, C, M)
        b_ddown = tl.dot(tl.trans(b_x.to(C.MIX)), b_dz, b_ddown, input_precision=C.PRECISION, out_dtype=C.ACC)
    if NEEDS.up:
        b_w = gated_statistic(z, gate, rows, 1.0, M.GATED, C, M)
        b_dup = tl.dot(tl.trans(b_dy), b_w, b_dup, input_precision=C.PRECISION, out_dtype=C.ACC)
    return Sums(b_ddiag, b_ddown, b_dup)


@triton.jit(
    do_not_specialize=[
        "length", "max_lag", "table_length", "num_rest", "first", "stop", "origin", "full", "most", "plane",
        "q_batch", "q_head", "k_batch", "k_head", "gate_batch", "gate_head",
    ]
)  # fmt: skip
def table_gradient_kernel(
    p_q, p_k, p_x, p_dy, p_z, p_gate, p_dz, p_ddiag, p_ddown, p_dup, p_blocks, p_valid,
    q_batch, q_token, q_head, k_batch, k_token, k_head, gate_batch, gate_token, gate_head,
    length, max_lag, table_length, num_rest, num_heads, num_maps, first, stop, origin, full, most, plane,
    SCORES: tl.constexpr, NEEDS: tl.constexpr, ALIGNED: tl.constexpr, ALIGNED_GATE: tl.constexpr,
    BLOCK: tl.constexpr, UNIT: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Adds to the gradients of ``diag``, ``down`` and ``up``: ``sum x dy``, ``sum x dz`` and ``sum dy (gate z)``.

    ``x`` is the mixing's input: scores, made again, or the map in plane ``p_x``. ``dy`` is in plane ``p_dy``,
    for the program's score map ``plane`` tiles further on. Gradients are ``[batches, maps, table_length(, BR)]``:
    each batch row has sums of its own, or with a block table there is one for all. Rows come in blocks, for which
    kernels are compiled as ``BLOCK`` says, and are taken group by group, as ``UNIT`` says.
    """
    ROWS: tl.constexpr = UNIT.BM
    BN: tl.constexpr = UNIT.BN
    BR: tl.constexpr = M.BR
    window = tl.program_id(0) // num_rest
    i_rest = tl.program_id(0) % num_rest
    i_first = tl.cdiv(first - i_rest, num_rest)
    i_stop = tl.cdiv(stop - i_rest, num_rest)
    if not BLOCK.HAS_BLOCKS and BLOCK.CAUSAL:
        i_first = tl.maximum(i_first, window * BN // BLOCK.BM)
    if i_first >= i_stop:
        return

    i_map = tl.program_id(1) * num_heads + (i_rest if BLOCK.HAS_BLOCKS else i_rest % num_heads)
    i_batch = i_rest * 0 if BLOCK.HAS_BLOCKS else i_rest // num_heads
    p_dy += tl.program_id(1).to(tl.int64) * plane * (BLOCK.BM * BN)
    q, k = Stream(p_q, q_batch, q_token, q_head), Stream(p_k, k_batch, k_token, k_head)
    gate = Stream(p_gate, gate_batch, gate_token, gate_head)
    planes = Planes(num_rest, origin, full, most)
    b_index = window
    if SCORES:
        # of the first token's scores the rotation takes the layout alone
        b_first = load_rows(Head(p_q, q_token), window * 0, 1, UNIT.K, UNIT.BM, UNIT.BK)
        b_keys = load_keys(Head(p_k, k_token), window * 0, 1, UNIT.K, UNIT.BN, UNIT.BK)
        b_anchor = tl.dot(b_first, b_keys, input_precision=UNIT.PRECISION, out_dtype=UNIT.ACC)
        b_index = rotation_index(b_anchor, UNIT.BM, UNIT.BN, UNIT.ASM)
    b_ddown = tl.zeros((BN, BR), UNIT.ACC)
    sums = Sums(tl.zeros((ROWS // 2 if SCORES else ROWS, BN), UNIT.ACC), b_ddown, b_ddown)
    unit_first = i_first * BLOCK.NG
    unit_stop = i_stop * BLOCK.NG
    if BLOCK.BY_LAG and not BLOCK.HAS_BLOCKS:
        unit_first = tl.maximum(unit_first, window)
        unit_stop = tl.minimum(unit_stop, tl.cdiv(length, BN))
    for unit in tl.range(unit_first, unit_stop, num_stages=UNIT.STAGES):
        block = place(p_blocks, unit // BLOCK.NG, i_rest, length, max_lag, num_heads, BLOCK.BM, BLOCK)
        t_first, t_stop = key_tiles(block, BLOCK)
        rows = from_row(block, block.i0 + unit % BLOCK.NG * BN)
        t = window
        if BLOCK.BY_LAG:
            t = rows.i0 // BN - window
        tile = block_tiles(unit // BLOCK.NG, i_rest, planes, BLOCK.BM // BN) + t - t_first
        o_tile = tile_offsets(tile, ROWS, BN, BLOCK.BM) + (rows.i0 - block.i0) * BN
        # of one sequence, every row of the range has a tile beside the window; of several, some have none
        if not BLOCK.HAS_BLOCKS or ((rows.i0 < rows.n) & (t >= t_first) & (t < t_stop)):
            sums = add_tile(
                sums, head_of(q, rows, i_map, ALIGNED), head_of(k, rows, i_map, ALIGNED), p_x + o_tile, p_dy + o_tile,
                compact_head(p_z, rows, i_map, num_maps, M.R), head_of(gate, rows, i_map, ALIGNED_GATE),
                compact_head(p_dz, rows, i_map, num_maps, M.R), p_valid, b_index, t, rows, SCORES, NEEDS, UNIT, M,
            )  # fmt: skip

    o_x = window * BN + tl.arange(0, BN)
    o_row = (i_batch * num_maps + i_map).to(tl.int64) * table_length + o_x
    inside = o_x < table_length
    o_low_rank = o_row[:, None] * BR + tl.arange(0, BR)[None, :]
    if NEEDS.diag:
        tl.store(p_ddiag + o_row, tl.sum(sums.diag, axis=0) + tl.load(p_ddiag + o_row, mask=inside), mask=inside)
    if NEEDS.down:
        b_before = tl.load(p_ddown + o_low_rank, mask=inside[:, None])
        tl.store(p_ddown + o_low_rank, sums.down + b_before, mask=inside[:, None])
    if NEEDS.up:
        b_before = tl.load(p_dup + o_low_rank, mask=inside[:, None])
        tl.store(p_dup + o_low_rank, sums.up + b_before, mask=inside[:, None])
