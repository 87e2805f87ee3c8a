"""What the backward's kernels share: a program's place in a chunk of row blocks, and the tiles kept for it.

A *plane* holds one map of every row block in the chunk, as whole tiles ``[BM, BN]`` one after another:
a block's from its first key tile on, then those of the same rows in the next head, then the next rows'.
No block has more tiles than ``most``; the first ``full`` blocks have ``BM / BN`` more each than the last
one (causal rows grow), so where a block begins is a formula. A plane is in column order (lags or
positions) or by key.
"""

import triton
import triton.language as tl

from hypermlp_kernels.blocks import load_rows, place


@triton.jit
def tiles_before(i_block, full, most, STEP: tl.constexpr):
    """Tiles kept for the row blocks of a head before ``i_block``."""
    growing = tl.minimum(i_block, full).to(tl.int64)
    return growing * (growing + 1) // 2 * STEP + (i_block - growing) * most


@triton.jit
def block_tiles(i_block, i_rest, origin, num_rest, full, most, STEP: tl.constexpr):
    """Where a row block's tiles begin in the planes of a chunk, in tiles; ``origin`` lies before the chunk."""
    own = tl.where(i_block < full, (i_block + 1) * STEP, most).to(tl.int64)
    return tiles_before(i_block, full, most, STEP) * num_rest + own * i_rest - origin


@triton.jit
def locate_in_chunk(
    p_blocks, last, origin, length, num_rest, num_heads, full, most,
    HAS_BLOCKS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``(batch, head, first token, tokens, i0, first tile)`` of this program: the chunk's last block first.

    Blocks are counted head after head, ``num_rest`` of them for the same rows.
    """
    i_flat = last - tl.program_id(0)
    i_block = i_flat // num_rest
    i_rest = i_flat % num_rest
    i_b, i_h, start, n, i0 = place(p_blocks, i_block, i_rest, length, num_heads, HAS_BLOCKS, BM)
    return i_b, i_h, start, n, i0, block_tiles(i_block, i_rest, origin, num_rest, full, most, BM // BN)


@triton.jit
def tile_offsets(tile, ROWS: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr):
    """``[ROWS, BN]`` offsets into a plane: the first ``ROWS`` rows of a tile."""
    return tile * (BM * BN) + tl.arange(0, ROWS)[:, None] * BN + tl.arange(0, BN)[None, :]


@triton.jit
def store_statistic_gradient(
    b_dw, p_z, p_gate, p_dz, p_dgate, i0, n, z_stride, gate_stride,
    R: tl.constexpr, GATED: tl.constexpr, GATE_GRADIENT: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """From the gradient of ``gate * z``, ``[BM, BR]``: that of ``z`` and, where asked for, of ``gate``."""
    o_m = tl.arange(0, BM)
    o_r = tl.arange(0, BR)
    inside = (i0 + o_m < n)[:, None] & (o_r < R)[None, :]
    offset = i0.to(tl.int64) * z_stride + o_m[:, None] * z_stride + o_r[None, :]
    if GATE_GRADIENT:
        tl.store(p_dgate + offset, b_dw * load_rows(p_z, i0, n, z_stride, R, BM, BR), mask=inside)
    if GATED:
        b_dw = b_dw * load_rows(p_gate, i0, n, gate_stride, R, BM, BR).to(b_dw.dtype)
    tl.store(p_dz + offset, b_dw, mask=inside)
