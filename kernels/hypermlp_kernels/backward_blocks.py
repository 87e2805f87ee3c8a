"""What the backward's kernels share: a program's place in a chunk of row blocks, and the tiles kept for it.

A *plane* holds one map of every row block in the chunk, as whole tiles ``[BM, BN]`` one after another:
a block's from its first key tile on, then those of the same rows in the next head, then the next rows'.
No block has more tiles than ``most``; the first ``full`` blocks have ``BM / BN`` more each than the last
one (causal rows grow), so where a block begins is a formula. A plane is in column order (lags or
positions) or by key.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from hypermlp_kernels.blocks import head_of, place


class Planes(NamedTuple):
    """Where a chunk's row blocks have their tiles: those of ``num_rest`` heads together, from tile ``origin`` on."""

    num_rest: tl.tensor
    origin: tl.tensor
    full: tl.tensor
    most: tl.tensor


@triton.jit
def block_tiles(i_block, i_rest, planes, STEP: tl.constexpr):
    """Where a row block's tiles begin, in tiles; its last row tile has ``STEP`` more than the block before."""
    growing = tl.minimum(i_block, planes.full).to(tl.int64)
    before = growing * (growing + 1) // 2 * STEP + (i_block - growing) * planes.most
    own = tl.where(i_block < planes.full, (i_block + 1) * STEP, planes.most).to(tl.int64)
    return before * planes.num_rest + own * i_rest - planes.origin


@triton.jit
def locate_in_chunk(p_blocks, last, planes, length, max_lag, num_heads, C: tl.constexpr):
    """``(rows, first tile)`` of this program: the chunk's last block first.

    Blocks are counted head after head, ``num_rest`` of them for the same rows.
    """
    i_flat = last - tl.program_id(0)
    i_block = i_flat // planes.num_rest
    i_rest = i_flat % planes.num_rest
    rows = place(p_blocks, i_block, i_rest, length, max_lag, num_heads, C.BM, C)
    return rows, block_tiles(i_block, i_rest, planes, C.BM // C.BN)


@triton.jit
def tile_offsets(tile, ROWS: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr):
    """``[ROWS, BN]`` offsets into a plane: the first ``ROWS`` rows of a tile."""
    return tile * (BM * BN) + tl.arange(0, ROWS)[:, None] * BN + tl.arange(0, BN)[None, :]


@triton.jit
def store_statistic_gradient(
    b_dw, p_z, gate, p_dz, p_dgate, i_own, num_maps, token, rows,
    GATE_GRADIENT: tl.constexpr, BM: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """From the gradient of ``gate * z``, ``[BM, BR]``: that of ``z`` and, where asked for, of ``gate``.

    Of the rows' head it is map ``i_own``, and ``token`` is their :func:`first_token`. All but the :class:`Stream` of
    gates are contiguous ``[B, T, num_maps, R]``.
    """
    # not by load_rows(): what a loop's beginning has computed alike, the compiler keeps through the loop, or spills
    own_map = i_own * rows.num_heads
    o_m = tl.arange(0, BM)[:, None]
    o_r = tl.arange(0, M.BR)[None, :]
    inside = (o_m < rows.n - rows.i0) & (o_r < M.R)
    first = (token * num_maps + rows.i_h + own_map) * M.R + rows.i0.to(tl.int64) * num_maps * M.R
    offset = o_m * num_maps * M.R + o_r
    if GATE_GRADIENT:
        b_z = tl.load(p_z + first + offset, mask=inside, other=0.0)
        tl.store(p_dgate + first + offset, b_dw * b_z, mask=inside)
    if M.GATED:
        p_gate = head_of(gate, rows, rows.i_h + own_map, False).p + rows.i0.to(tl.int64) * gate.token
        b_dw = b_dw * tl.load(p_gate + o_m * gate.token + o_r, mask=inside, other=0.0).to(b_dw.dtype)
    tl.store(p_dz + first + offset, b_dw, mask=inside)
