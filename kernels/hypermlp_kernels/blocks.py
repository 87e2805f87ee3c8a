"""What the kernels share: a program's place, its key tiles, tables beside a tile, and the operator's steps.

Positions are relative to the first token of the program's sequence. ``i0`` is the first of its ``BM``
query rows, ``t`` a tile of ``BN`` keys. By lag, a tile's columns are the lags of its *lag window*, which
starts at ``i0 - t * BN`` for the first group of ``BN`` rows and ``BN`` later for every next one; by
position they are its keys, and all rows form one group.
"""

import triton
import triton.language as tl

from hypermlp_kernels.skew import high_float, low_float, pack, rotate

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# units of the two sums of squares (norm_of) and where the one of small numbers comes to its end
SMALL = tl.constexpr(2.0**-40)
LARGE = tl.constexpr(2.0**66)
FULL = tl.constexpr(2.0**124)


@triton.jit
def place(p_blocks, i_block, i_rest, length, num_heads, HAS_BLOCKS: tl.constexpr, ROWS: tl.constexpr):
    """``(batch, head, first token, tokens, first row)`` of a block of ``ROWS`` rows."""
    if HAS_BLOCKS:
        p_block = p_blocks + i_block * 4
        i_b = tl.load(p_block)
        start = tl.load(p_block + 1)
        n = tl.load(p_block + 2)
        i0 = tl.load(p_block + 3)
        i_h = i_rest
    else:
        i_b = i_rest // num_heads
        i_h = i_rest % num_heads
        start = tl.full((), 0, tl.int32)
        n = tl.full((), 0, tl.int32) + length
        i0 = i_block * ROWS
    return i_b.to(tl.int64), i_h.to(tl.int64), start, n, i0


@triton.jit
def locate(p_blocks, length, num_blocks, num_heads, HAS_BLOCKS: tl.constexpr, BM: tl.constexpr):
    """:func:`place` of this program: longest rows first, head after head."""
    i_block = num_blocks - 1 - tl.program_id(0) % num_blocks
    return place(p_blocks, i_block, tl.program_id(0) // num_blocks, length, num_heads, HAS_BLOCKS, BM)


@triton.jit
def head_of(p_x, i_b, start, i_h, batch, token, head, ALIGNED: tl.constexpr):
    """First token of a sequence in a head; ``ALIGNED``: all strides are multiples of 16 elements.

    Strides over all tokens change with their number, and a kernel specialized to whether 16 divides them would be
    compiled again for another. They are not, and what loads need to know about alignment is said here.
    """
    offset = i_b * batch + i_h * head
    if ALIGNED:
        offset = offset // 16 * 16
    return p_x + offset + start.to(tl.int64) * token


@triton.jit
def key_tiles(i0, n, max_lag, BY_LAG: tl.constexpr, CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """First key tile that a row sees, and one past the last."""
    first = 0
    if BY_LAG:
        first = tl.maximum(i0 + 1 - max_lag, 0) // BN
    stop = n
    if CAUSAL:
        stop = tl.minimum(i0 + BM, n)
    return first, tl.cdiv(stop, BN)


@triton.jit
def load_rows(p_x, i0, n, stride, WIDTH: tl.constexpr, BM: tl.constexpr, BW: tl.constexpr):
    """``[BM, BW]``: tokens ``i0 ..`` of one head, zero past the sequence and past the width."""
    o_m = tl.arange(0, BM)
    o_w = tl.arange(0, BW)
    inside = (i0 + o_m < n)[:, None]
    if WIDTH < BW:
        inside = inside & (o_w < WIDTH)[None, :]
    p_first = p_x + i0.to(tl.int64) * stride
    return tl.load(p_first + o_m[:, None] * stride + o_w[None, :], mask=inside, other=0.0)


@triton.jit
def load_keys(p_k, t, n, stride, WIDTH: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr):
    """``[BW, BN]``: a tile of keys, transposed."""
    o_n = tl.arange(0, BN)
    o_w = tl.arange(0, BW)
    inside = (t * BN + o_n < n)[None, :]
    if WIDTH < BW:
        inside = inside & (o_w < WIDTH)[:, None]
    p_first = p_k + tl.cast(t * BN, tl.int64) * stride
    return tl.load(p_first + o_n[None, :] * stride + o_w[:, None], mask=inside, other=0.0)


@triton.jit
def table_rows(p_table, x0, max_lag, NG: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):
    """``[BN, NG * BR]``: row ``c``, column ``g * BR + r`` is ``table[x0 + g * BN + c, r]``, zero outside the table."""
    o_w = tl.arange(0, NG * BR)
    o_x = x0 + tl.arange(0, BN)[:, None] + (o_w // BR * BN)[None, :]
    return tl.load(p_table + o_x * BR + (o_w % BR)[None, :], mask=(o_x >= 0) & (o_x < max_lag), other=0.0)


@triton.jit
def scale_rows(p_scale, x0, max_lag, NG: tl.constexpr, BN: tl.constexpr):
    """``[NG * BN or 1, BN]``: each row group's window of a diagonal."""
    if NG == 1:
        o_x = x0 + tl.arange(0, BN)
        return tl.load(p_scale + o_x, mask=(o_x >= 0) & (o_x < max_lag), other=0.0)[None, :]
    else:  # noqa: RET505  a compile-time branch
        o_x = x0 + tl.arange(0, NG)[:, None] * BN + tl.arange(0, BN)[None, :]
        window = tl.load(p_scale + o_x, mask=(o_x >= 0) & (o_x < max_lag), other=0.0)
        return tl.reshape(tl.broadcast_to(window[:, None, :], (NG, BN, BN)), (NG * BN, BN))


@triton.jit
def pick_group(b_z, BM: tl.constexpr, NG: tl.constexpr, BR: tl.constexpr):
    """From ``[BM, NG * BR]`` each row's own group, ``[BM, BR]``."""
    if NG == 1:
        return b_z
    else:  # noqa: RET505  a compile-time branch
        own = (tl.arange(0, BM) // (BM // NG))[:, None] == tl.arange(0, NG)[None, :]
        return tl.sum(tl.where(own[:, :, None], tl.reshape(b_z, (BM, NG, BR)), 0.0), axis=1)


@triton.jit
def place_group(b_w, BM: tl.constexpr, NG: tl.constexpr, BR: tl.constexpr):
    """Inverse of :func:`pick_group`: ``[BM, NG * BR]``, zero outside each row's own group."""
    if NG == 1:
        return b_w
    else:  # noqa: RET505  a compile-time branch
        own = (tl.arange(0, BM) // (BM // NG))[:, None] == tl.arange(0, NG)[None, :]
        wide = tl.where(own[:, :, None], tl.broadcast_to(b_w[:, None, :], (BM, NG, BR)), 0.0)
        return tl.reshape(wide, (BM, NG * BR))


@triton.jit
def gated_statistic(
    p_z, p_gate, i0, n, z_stride, gate_stride, unit,
    R: tl.constexpr, GATED: tl.constexpr, MIX: tl.constexpr, BM: tl.constexpr, NG: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """``unit * gate * z`` of the program's rows as a dot operand ``[BM, NG * BR]``."""
    b_w = load_rows(p_z, i0, n, z_stride, R, BM, BR) * unit
    if GATED:
        b_w = b_w * load_rows(p_gate, i0, n, gate_stride, R, BM, BR).to(b_w.dtype)
    return place_group(b_w, BM, NG, BR).to(MIX)


@triton.jit
def mix(
    b_x, b_w, p_scale, p_up, x0, max_lag,
    UNIT: tl.constexpr, SCALE: tl.constexpr, LOW_RANK: tl.constexpr, PRECISION: tl.constexpr,
    NG: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """``x * scale + w up^T`` of a tile in column order; ``UNIT`` is the identity in the map's unit."""
    if SCALE == "table":
        b_y = b_x * scale_rows(p_scale, x0, max_lag, NG, BN)
    elif SCALE == "identity":
        b_y = b_x * UNIT
    else:
        b_y = b_x * 0.0
    if LOW_RANK:
        b_up = tl.trans(table_rows(p_up, x0, max_lag, NG, BN, BR))
        b_y = tl.dot(b_w, b_up, b_y, input_precision=PRECISION, out_dtype=b_y.dtype)
    return b_y


@triton.jit
def softplus2(b_u, ASM: tl.constexpr):
    """``log2(1 + 2^u)``: softplus in units of ln 2 of an argument in the same units."""
    if ASM:
        e = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [-tl.abs(b_u)], dtype=tl.float32, is_pure=True, pack=1
        )
        # tl.log2 is a polynomial of two dozen instructions
        log = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + e], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        e = tl.exp2(-tl.abs(b_u))
        log = tl.log2(1.0 + e)
    # 1 + e drops the low bits of a small e: a row whose scale map is far below zero would lose its digits
    series = e * (1.4426950408889634 + e * (-0.7213475204444817 + e * 0.4808983469629878))
    return tl.maximum(b_u, 0.0, propagate_nan=tl.PropagateNan.ALL) + tl.where(e < 0.015625, series, log)


@triton.jit
def select(b_gate, b_scale, GLU: tl.constexpr, ASM: tl.constexpr):
    """``relu(g) softplus(u)``, in units of ln 2, or ``relu(g)``. A NaN stays one."""
    b_a = tl.maximum(b_gate, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if GLU:
        b_a = b_a * softplus2(b_scale, ASM)
    return b_a


@triton.jit
def norm_of(b_small, b_large):
    """A norm from the sums of the squares of ``x / SMALL`` and of ``x / LARGE``. A NaN stays one.

    Squares in one unit overflow, or vanish, long before the norm does; these two have norms from 2^-84 to 2^127.
    """
    return tl.where(b_small < FULL, tl.sqrt(b_small) * SMALL, tl.sqrt(b_large) * LARGE)


@triton.jit
def score_words(
    b_qg, b_qs, p_kg, p_ks, t, n, k_stride,
    K: tl.constexpr, GLU: tl.constexpr, PACKED: tl.constexpr, ASM: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Scores of a key tile, by key, as 32-bit words: ``(gate, scale)``.

    Packed, both are the one tile that holds the two maps; with one map there is no scale and both are it.
    """
    b_gate = tl.dot(b_qg, load_keys(p_kg, t, n, k_stride, K, BN, BK), input_precision=PRECISION, out_dtype=ACC)
    b_scale = b_gate
    if GLU:
        b_scale = tl.dot(b_qs, load_keys(p_ks, t, n, k_stride, K, BN, BK), input_precision=PRECISION, out_dtype=ACC)
        if PACKED:
            b_gate = pack(b_gate, b_scale, ASM)
            b_scale = b_gate
    return b_gate, b_scale


@triton.jit
def score_columns(
    b_qg, b_qs, p_kg, p_ks, t, n, k_stride, b_index, b_last_gate, b_last_scale,
    K: tl.constexpr, GLU: tl.constexpr, BY_LAG: tl.constexpr, PACKED: tl.constexpr, ASM: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile's words in column order, and what the next tile needs: ``(gate, scale, last_gate, last_scale)``.

    By lag the last key tile, rotated, holds the larger lags of this one's window; it starts as zero.
    """
    b_gate, b_scale = score_words(b_qg, b_qs, p_kg, p_ks, t, n, k_stride, K, GLU, PACKED, ASM, ACC, PRECISION, BN, BK)
    if BY_LAG:
        current = tl.arange(0, BN)[None, :] <= (tl.arange(0, BM) % BN)[:, None]
        b_turned = rotate(b_gate, b_index, BM, BN)
        b_gate = tl.where(current, b_turned, b_last_gate)
        b_last_gate = b_turned
        if GLU and not PACKED:
            b_turned_scale = rotate(b_scale, b_index, BM, BN)
            b_scale = tl.where(current, b_turned_scale, b_last_scale)
            b_last_scale = b_turned_scale
        else:
            b_scale = b_gate
    return b_gate, b_scale, b_last_gate, b_last_scale


@triton.jit
def as_floats(b_gate, b_scale, PACKED: tl.constexpr):
    """Both score maps in the accumulator's type."""
    if PACKED:
        return low_float(b_gate), high_float(b_gate)
    else:  # noqa: RET505  a compile-time branch
        return b_gate, b_scale
