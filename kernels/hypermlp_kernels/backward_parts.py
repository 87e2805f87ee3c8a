"""Rows split along keys: where a chunk has few blocks of long rows, several programs share a block.

Each takes a *part*, ``span`` of the block's key tiles, and leaves its part of a sum over the row in a scratch
``[maps, blocks, parts, BM, width]``. :func:`add_parts_kernel` adds the parts up, in one order.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from hypermlp_kernels.backward_blocks import Planes, locate_in_chunk, store_statistic_gradient, tile_offsets
from hypermlp_kernels.blocks import Stream, first_token, from_row, key_tiles


class Part(NamedTuple):
    """Key tiles ``t_first`` to ``t_stop`` of rows that have them up to ``t_end``, and where their tiles begin."""

    tile0: tl.tensor
    t_first: tl.tensor
    t_stop: tl.tensor
    t_end: tl.tensor


@triton.jit
def part_of(rows, tile0, span, SPLIT: tl.constexpr, C: tl.constexpr):
    """This program's :class:`Part` of the rows, whose tiles begin at ``tile0``: without ``SPLIT`` all of them."""
    t_first, t_end = key_tiles(rows, C)
    t_stop = t_end
    if SPLIT:
        skipped = tl.program_id(1) * span
        tile0 += skipped
        t_first += skipped
        t_stop = tl.minimum(t_end, t_first + span)
    return Part(tile0, t_first, t_stop, t_end)


@triton.jit
def store_part(p_parts, b_x, i_map, BM: tl.constexpr, BW: tl.constexpr):
    """This program's part of a sum over the row, ``[BM, BW]``."""
    i_part = (tl.cast(i_map, tl.int64) * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)
    tl.store(p_parts + tile_offsets(i_part, BM, BW, BM), b_x)


@triton.jit(
    do_not_specialize=[
        "length", "max_lag", "num_rest", "num_maps", "last", "origin", "full", "most", "span", "parts",
        "gate_batch", "gate_token", "gate_head",
    ]
)  # fmt: skip
def add_parts_kernel(
    p_parts, p_z, p_gate, p_out, p_dgate, p_blocks,
    gate_batch, gate_token, gate_head,
    length, max_lag, num_rest, num_heads, num_maps, last, origin, full, most, span, parts,
    GATE_GRADIENT: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Sums over rows, ``[B, T, maps, R]``, from their parts, first to last; ``ROWS`` of a block to a program.

    A sum is ``dq``, or the gradient of ``gate z`` and makes those of both (``store_statistic_gradient``).
    """
    BR: tl.constexpr = M.BR
    rows, _ = locate_in_chunk(p_blocks, last, Planes(num_rest, origin, full, most), length, max_lag, num_heads, C)
    t_first, t_stop = key_tiles(rows, C)
    rows = from_row(rows, rows.i0 + tl.program_id(2) * ROWS)
    if rows.i0 >= rows.n:
        return
    first_part = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * parts
    p_rows = p_parts + tl.program_id(2) * ROWS * BR
    b_sum = tl.zeros((ROWS, BR), C.ACC)
    for i_part in tl.range(0, tl.cdiv(t_stop - t_first, span), num_stages=C.STAGES):
        b_sum += tl.load(p_rows + tile_offsets(first_part + i_part, ROWS, BR, C.BM))
    gate = Stream(p_gate, gate_batch, gate_token, gate_head)
    i_own = tl.program_id(1).to(tl.int64)
    store_statistic_gradient(
        b_sum, p_z, gate, p_out, p_dgate, i_own, num_maps, first_token(rows), rows, GATE_GRADIENT, ROWS, M
    )
