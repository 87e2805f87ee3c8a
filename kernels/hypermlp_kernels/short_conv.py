"""The short depthwise convolution over tokens: ``y[t] = sum_r taps[:, -1 - r] x[t - r]``, and both its gradients.

A program computes a tile of tokens by channels. The tile's input is loaded once for each reach ``r``, a row further on
every time: all but a few rows of that come from the multiprocessor's own cache, so memory is read once.
"""

import triton
import triton.language as tl


@triton.jit
def tile_place(channels, num_blocks, BT: tl.constexpr, BD: tl.constexpr):
    """``(batch row, block of tokens, tokens [BT], channels [BD])``: neighbours in the grid share the rows of memory."""
    channel_blocks = tl.cdiv(channels, BD)
    i_d = tl.program_id(0) % channel_blocks
    i_block = tl.program_id(0) // channel_blocks
    i_b = (i_block // num_blocks).to(tl.int64)
    return i_b, i_block, (i_block % num_blocks) * BT + tl.arange(0, BT), i_d * BD + tl.arange(0, BD)


@triton.jit
def batch_row(p_x, i_b, batch_stride, ALIGNED: tl.constexpr):
    """A batch row's first token; ``ALIGNED`` says of strides what Triton may not find out of one that goes with T."""
    offset = i_b * batch_stride
    if ALIGNED:
        offset = offset // 16 * 16
    return p_x + offset


@triton.jit
def load_rows(p_x, o_t, o_d, seen, inside, token_stride):
    """``[BT, BD]`` of tokens ``o_t``, zero where not ``seen``."""
    p_rows = p_x + o_t.to(tl.int64)[:, None] * token_stride + o_d[None, :]
    return tl.load(p_rows, mask=seen[:, None] & inside[None, :], other=0.0)


@triton.jit(do_not_specialize=["x_batch", "length", "past", "num_blocks"])
def short_conv_kernel(
    p_x, p_taps, p_starts, p_y,
    x_batch, x_token, tap_channel, tap_step, length, past, channels, num_blocks,
    SIZE: tl.constexpr, PACKED: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """``y`` ``[B, length, channels]`` from ``x`` ``[B, past + length, channels]``."""
    i_b, _, o_t, o_d = tile_place(channels, num_blocks, BT, BD)
    exists, inside = o_t < length, o_d < channels
    p_x = batch_row(p_x, i_b, x_batch, ALIGNED)
    first = tl.zeros((BT,), tl.int32)
    if PACKED:
        first = tl.load(p_starts + o_t, mask=exists, other=0)
    b_y = tl.zeros((BT, BD), ACC)
    for reach in tl.static_range(SIZE):
        o_s = o_t + past - reach
        b_x = load_rows(p_x, o_s, o_d, exists & (o_s >= first), inside, x_token)
        b_tap = tl.load(p_taps + o_d * tap_channel + (SIZE - 1 - reach) * tap_step, mask=inside, other=0.0)
        b_y += b_x.to(ACC) * b_tap.to(ACC)[None, :]
    p_rows = p_y + i_b * length * channels + o_t.to(tl.int64)[:, None] * channels + o_d[None, :]
    tl.store(p_rows, b_y.to(p_y.dtype.element_ty), mask=exists[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["dy_batch", "x_batch", "length", "past", "num_blocks"])
def short_conv_backward_kernel(
    p_dy, p_x, p_taps, p_stops, p_dx, p_parts,
    dy_batch, dy_token, x_batch, x_token, tap_channel, tap_step, length, past, channels, num_blocks,
    SIZE: tl.constexpr, PACKED: tl.constexpr, INPUT: tl.constexpr, TAPS: tl.constexpr,
    ALIGNED_DY: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """``dx`` like ``x``, and this tile's part ``[SIZE, channels]`` of the taps' gradient.

    Both are sums over the outputs that read a token: ``dx[s] = sum_r taps[-1 - r] dy[s + r]``, and
    ``dtaps[-1 - r] = sum_s x[s] dy[s + r]``.
    """
    i_b, i_block, o_s, o_d = tile_place(channels, num_blocks, BT, BD)
    exists, inside = o_s < past + length, o_d < channels
    p_dy = batch_row(p_dy, i_b, dy_batch, ALIGNED_DY)
    stop = tl.zeros((BT,), tl.int32) + length
    if PACKED:
        stop = tl.load(p_stops + o_s, mask=exists, other=0)
    if TAPS:
        b_x = load_rows(batch_row(p_x, i_b, x_batch, ALIGNED), o_s, o_d, exists, inside, x_token).to(ACC)
    b_dx = tl.zeros((BT, BD), ACC)
    for reach in tl.static_range(SIZE):
        o_t = o_s - past + reach
        seen = (o_t >= 0) & (o_t < stop)
        b_dy = load_rows(p_dy, o_t, o_d, seen, inside, dy_token).to(ACC)
        if INPUT:
            b_tap = tl.load(p_taps + o_d * tap_channel + (SIZE - 1 - reach) * tap_step, mask=inside, other=0.0)
            b_dx += b_dy * b_tap.to(ACC)[None, :]
        if TAPS:
            # replaced, since an input that is not finite makes NaN of a zero
            b_part = tl.sum(tl.where(seen[:, None], b_x, 0.0) * b_dy, axis=0)
            o_part = (i_block.to(tl.int64) * SIZE + (SIZE - 1 - reach)) * channels + o_d
            tl.store(p_parts + o_part, b_part, mask=inside)
    if INPUT:
        p_rows = p_dx + i_b * (past + length) * channels + o_s.to(tl.int64)[:, None] * channels + o_d[None, :]
        tl.store(p_rows, b_dx.to(p_dx.dtype.element_ty), mask=exists[:, None] & inside[None, :])
