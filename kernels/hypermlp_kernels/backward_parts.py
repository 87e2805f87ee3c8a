"""Rows split along keys: where a chunk has few blocks of long rows, several programs share a block.

Each takes a *part*, ``span`` of the block's key tiles, and leaves its part of a sum over the row in a scratch
``[maps, blocks, parts, BM, width]``. :func:`add_parts_kernel` adds the parts up, in one order.
"""

import triton
import triton.language as tl

from hypermlp_kernels.backward_blocks import locate_in_chunk, store_statistic_gradient, tile_offsets
from hypermlp_kernels.blocks import head_of, key_tiles


@triton.jit
def own_part(tile0, t_first, t_stop, span, SPLIT: tl.constexpr):
    """``(first tile in the plane, first key tile, one past the last)`` of this program's part, empty in a short row."""
    if SPLIT:
        skipped = tl.program_id(1) * span
        tile0 += skipped
        t_first += skipped
        t_stop = tl.minimum(t_stop, t_first + span)
    return tile0, t_first, t_stop


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
    R: tl.constexpr, GATED: tl.constexpr, GATE_GRADIENT: tl.constexpr,
    BY_LAG: tl.constexpr, CAUSAL: tl.constexpr, HAS_BLOCKS: tl.constexpr, ACC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums over rows, ``[B, T, maps, R]``, from their parts, first to last; ``ROWS`` of a block to a program.

    A sum is ``dq``, or the gradient of ``gate z`` and makes those of both (``store_statistic_gradient``).
    """
    i_b, i_h, start, n, i0, _ = locate_in_chunk(
        p_blocks, last, origin, length, num_rest, num_heads, full, most, HAS_BLOCKS, BM, BN
    )
    t_first, t_stop = key_tiles(i0, n, max_lag, BY_LAG, CAUSAL, BM, BN)
    r0 = i0 + tl.program_id(2) * ROWS
    if r0 >= n:
        return
    first_part = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * parts
    p_rows = p_parts + tl.program_id(2) * ROWS * BR
    b_sum = tl.zeros((ROWS, BR), ACC)
    for i_part in tl.range(0, tl.cdiv(t_stop - t_first, span), num_stages=STAGES):
        b_sum += tl.load(p_rows + tile_offsets(first_part + i_part, ROWS, BR, BM))
    i_map = i_h + tl.program_id(1) * num_heads
    offset = ((i_b * length + start) * num_maps + i_map) * R
    p_gate_rows = head_of(p_gate, i_b, start, i_map, gate_batch, gate_token, gate_head, False)
    store_statistic_gradient(
        b_sum, p_z + offset, p_gate_rows, p_out + offset, p_dgate + offset,
        r0, n, num_maps * R, gate_token, R, GATED, GATE_GRADIENT, ROWS, BR,
    )  # fmt: skip
