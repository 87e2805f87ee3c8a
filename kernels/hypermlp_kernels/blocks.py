"""What the kernels share: a program's place, its key tiles, and what lies in memory beside a tile.

Positions are relative to the first token of the program's sequence. ``rows.i0`` is the first of its ``BM``
query rows, ``t`` a tile of ``BN`` keys. By lag, a tile's columns are the lags of its *lag window*, which
starts at ``i0 - t * BN`` for the first group of ``BN`` rows and ``BN`` later for every next one; by
position they are its keys, and all rows form one group.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Rows(NamedTuple):
    """A program's query rows: those from ``i0`` on of head ``i_h`` in a sequence of ``n`` tokens.

    The sequence begins at ``start`` in batch row ``i_b``, of which each is ``length`` tokens long.
    """

    i_b: tl.tensor
    i_h: tl.tensor
    start: tl.tensor
    length: tl.tensor
    n: tl.tensor
    i0: tl.tensor
    num_heads: tl.tensor
    max_lag: tl.tensor


class Stream(NamedTuple):
    """``[B, T, heads, width]`` in memory and its strides, of which the last is 1."""

    p: tl.tensor
    batch: tl.tensor
    token: tl.tensor
    head: tl.tensor


class Head(NamedTuple):
    """One head of a stream: where its sequence's first token is, and the stride between tokens."""

    p: tl.tensor
    token: tl.tensor


@triton.jit
def place(p_blocks, i_block, i_rest, length, max_lag, num_heads, ROWS: tl.constexpr, C: tl.constexpr):
    """A block of ``ROWS`` rows, as :class:`Rows`."""
    if C.HAS_BLOCKS:
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
    i_b = i_b.to(tl.int64)
    return Rows(i_b, i_h.to(tl.int64), start, length, n, i0, num_heads, max_lag)


@triton.jit
def locate(p_blocks, length, max_lag, num_blocks, num_heads, C: tl.constexpr):
    """:func:`place` of this program: longest rows first, head after head."""
    i_block = num_blocks - 1 - tl.program_id(0) % num_blocks
    return place(p_blocks, i_block, tl.program_id(0) // num_blocks, length, max_lag, num_heads, C.BM, C)


@triton.jit
def first_token(rows):
    """The sequence's first token, counted over all batch rows. Made where it is used: kept, it costs registers."""
    return rows.i_b * rows.length + rows.start


@triton.jit
def from_row(rows, i0):
    """The rows from ``i0`` on."""
    return Rows(rows.i_b, rows.i_h, rows.start, rows.length, rows.n, i0, rows.num_heads, rows.max_lag)


@triton.jit
def head_of(x, rows, i_head, ALIGNED: tl.constexpr):
    """A head of a :class:`Stream` from the rows' sequence on; ``ALIGNED``: all strides are multiples of 16 elements.

    Strides over all tokens change with their number, and a kernel specialized to whether 16 divides them would be
    compiled again for another. They are not, and what loads need to know about alignment is said here.
    """
    offset = rows.i_b * x.batch + i_head * x.head
    if ALIGNED:
        offset = offset // 16 * 16
    return Head(x.p + offset + rows.start.to(tl.int64) * x.token, x.token)


@triton.jit
def compact_head(p_x, rows, i_head, num_heads, WIDTH: tl.constexpr):
    """A head of a contiguous ``[B, T, num_heads, WIDTH]``, likewise."""
    return Head(p_x + (first_token(rows) * num_heads + i_head) * WIDTH, num_heads * WIDTH)


@triton.jit
def row_offsets(rows, BM: tl.constexpr):
    """``[BM]`` offsets of the rows into ``[B, T, heads]``, and which of them there are."""
    o_m = tl.arange(0, BM)
    first = (first_token(rows) + rows.i0) * rows.num_heads + rows.i_h
    return first + o_m.to(tl.int64) * rows.num_heads, rows.i0 + o_m < rows.n


@triton.jit
def key_tiles(rows, C: tl.constexpr):
    """First key tile that a row sees, and one past the last."""
    first = 0
    if C.BY_LAG:
        first = tl.maximum(rows.i0 + 1 - rows.max_lag, 0) // C.BN
    stop = rows.n
    if C.CAUSAL:
        stop = tl.minimum(rows.i0 + C.BM, rows.n)
    return first, tl.cdiv(stop, C.BN)


@triton.jit
def first_column(t, rows, C: tl.constexpr):
    """Table row of a tile's first column, in its first group of rows."""
    return rows.i0 - t * C.BN if C.BY_LAG else t * C.BN


@triton.jit
def load_rows(x, i0, n, WIDTH: tl.constexpr, BM: tl.constexpr, BW: tl.constexpr):
    """``[BM, BW]``: tokens ``i0 ..`` of one head, zero past the sequence and past the width."""
    o_m = tl.arange(0, BM)
    o_w = tl.arange(0, BW)
    inside = (i0 + o_m < n)[:, None]
    if WIDTH < BW:
        inside = inside & (o_w < WIDTH)[None, :]
    p_first = x.p + i0.to(tl.int64) * x.token
    return tl.load(p_first + o_m[:, None] * x.token + o_w[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(x, b_x, i0, n, WIDTH: tl.constexpr, BM: tl.constexpr, BW: tl.constexpr):
    """Store what :func:`load_rows` would load."""
    o_m = tl.arange(0, BM)
    o_w = tl.arange(0, BW)
    inside = (i0 + o_m < n)[:, None] & (o_w < WIDTH)[None, :]
    p_first = x.p + i0.to(tl.int64) * x.token
    tl.store(p_first + o_m[:, None].to(tl.int64) * x.token + o_w[None, :], b_x, mask=inside)


@triton.jit
def load_keys(x, t, n, WIDTH: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr):
    """``[BW, BN]``: a tile of keys, transposed."""
    o_n = tl.arange(0, BN)
    o_w = tl.arange(0, BW)
    inside = (o_n < n - t * BN)[None, :]
    if WIDTH < BW:
        inside = inside & (o_w < WIDTH)[:, None]
    p_first = x.p + tl.cast(t * BN, tl.int64) * x.token
    return tl.load(p_first + o_n[None, :] * x.token + o_w[:, None], mask=inside, other=0.0)


@triton.jit
def table_rows(p_table, x0, max_lag, NG: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, EDGE: tl.constexpr = True):
    """``[BN, NG * BR]``: row ``c``, column ``g * BR + r`` is ``table[x0 + g * BN + c, r]``.

    Zero outside the table, where not all rows are asked for of which the table has some (``EDGE``).
    """
    o_w = tl.arange(0, NG * BR)
    o_x = x0 + tl.arange(0, BN)[:, None] + (o_w // BR * BN)[None, :]
    inside = o_x.to(tl.uint32) < max_lag.to(tl.uint32) if EDGE else None
    return tl.load(p_table + o_x * BR + (o_w % BR)[None, :], mask=inside, other=0.0 if EDGE else None)


@triton.jit
def scale_rows(p_scale, x0, max_lag, NG: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr = True):
    """``[NG * BN or 1, BN]``: each row group's window of a diagonal; ``EDGE`` as in :func:`table_rows`."""
    if NG == 1:
        o_x = x0 + tl.arange(0, BN)
        inside = o_x.to(tl.uint32) < max_lag.to(tl.uint32) if EDGE else None
        return tl.load(p_scale + o_x, mask=inside, other=0.0 if EDGE else None)[None, :]
    else:  # noqa: RET505  a compile-time branch
        o_x = x0 + tl.arange(0, NG)[:, None] * BN + tl.arange(0, BN)[None, :]
        inside = o_x.to(tl.uint32) < max_lag.to(tl.uint32) if EDGE else None
        window = tl.load(p_scale + o_x, mask=inside, other=0.0 if EDGE else None)
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
def inverse_norm(p_rho, rows, C: tl.constexpr):
    """``1 / rho`` of the rows, ``[BM]``."""
    o_row, inside = row_offsets(rows, C.BM)
    return 1.0 / tl.load(p_rho + o_row, mask=inside, other=1.0)
