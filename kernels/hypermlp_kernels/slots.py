"""Where decoding finds a cache's slots, and what stands beside them.

*Slots* are counted over one or two segments of memory, from the older segment's first to the newer one's last.
By lag the newest token's slot has lag 0 and lags grow towards the older ones; in a ring (one segment) they go on
from its end. Programs share out tiles of ``BN`` slots, each in one segment. How many tiles there are may be known
to the device alone (the ``length`` of a ring), so the grid never depends on it.
"""

import triton
import triton.language as tl


@triton.jit
def row_and_split(num_heads, batch):
    """``(batch row, head, split)`` of this program. Batch rows are neighbours: they read the same table rows."""
    i_b = tl.program_id(0) % batch
    i_h = tl.program_id(0) // batch
    return i_b.to(tl.int64), i_h.to(tl.int64), tl.program_id(1)


@triton.jit
def extent(p_length, older, slots, RING: tl.constexpr):
    """``(slots of the older segment, filled slots, slot of the newest token)``."""
    filled = slots
    newest = slots - 1
    if RING:
        length = tl.load(p_length)
        filled = tl.minimum(length, slots).to(tl.int32)
        newest = ((length - 1) % slots).to(tl.int32)
    return tl.minimum(older, filled), filled, newest


@triton.jit
def share(older, filled, skip, num_splits, BN: tl.constexpr):
    """``(first tile, one past the last, tiles of the older segment)`` of this program's split.

    The older segment's first tile begins ``skip`` elements before its first slot, where memory is aligned.
    """
    tiles_older = tl.cdiv(older + skip, BN)
    tiles = tiles_older + tl.cdiv(filled - older, BN)
    i_split = tl.program_id(1)
    first = tiles * i_split // num_splits
    stop = tiles * (i_split + 1) // num_splits
    return first, stop, tiles_older


@triton.jit
def tile_slots(t, tiles_older, older, filled, skip, BN: tl.constexpr):
    """``(in the newer segment, offset in its memory, slots [BN], which there are, whether all are)`` of a tile."""
    newer = t >= tiles_older
    x0 = (t - tl.where(newer, tiles_older, 0)) * BN
    first = x0 + tl.where(newer, older, -skip)
    low = tl.where(newer, older, 0)
    high = tl.where(newer, filled, older)
    o_slot = first + tl.arange(0, BN)
    inside = (o_slot >= low) & (o_slot < high)
    return newer, x0, o_slot, inside, (first >= low) & (first + BN <= high)


@triton.jit
def table_rows(
    o_slot, inside, newest, slots, max_lag, start, p_valid, valid_slot, BY_LAG: tl.constexpr, HOLES: tl.constexpr
):
    """``(table row of each slot, whether the query sees it)``."""
    if BY_LAG:
        o_row = newest - o_slot
        o_row = tl.where(o_row < 0, o_row + slots, o_row)
    else:
        o_row = o_slot - start
    seen = inside & (o_row >= 0) & (o_row < max_lag)
    if HOLES:
        seen = seen & (tl.load(p_valid + o_slot.to(tl.int64) * valid_slot, mask=inside, other=0) != 0)
    return o_row, seen


@triton.jit
def load_start(p_start, i_b, BY_LAG: tl.constexpr):
    """Slot of the batch row's table row 0, in the position layout."""
    if BY_LAG:
        return 0
    else:  # noqa: RET505  a compile-time branch
        return tl.load(p_start + i_b).to(tl.int32)


@triton.jit
def load_tile(
    p_x, x0, inside, full, seen, slot_stride, width_stride, w0,
    WIDTH: tl.constexpr, SLOTS_LAST: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """``[BN, BW]`` of a segment's keys or values, channels ``w0 ..`` from ``x0`` on: zero outside and where hidden."""
    o_w = w0 + tl.arange(0, BW)
    p_tile = p_x + x0.to(tl.int64) * slot_stride
    p_tile = p_tile + tl.arange(0, BN)[:, None] * slot_stride + o_w[None, :] * width_stride
    wide = (o_w < WIDTH)[None, :]
    if SLOTS_LAST:
        # a comparison along memory's last dimension would split loads into single elements
        if full:  # noqa: SIM108  two loads, not one with a mask to choose
            b_x = tl.load(p_tile, mask=wide, other=0.0)
        else:
            b_x = tl.load(p_tile, mask=inside[:, None] & wide, other=0.0)
    else:
        b_x = tl.load(p_tile, mask=seen[:, None] & wide, other=0.0)
    return b_x


@triton.jit
def load_table(p_table, o_row, seen, row_stride, R: tl.constexpr, BR: tl.constexpr):
    """``[BN, BR]``: a table's rows, zero where unseen and past the rank."""
    o_r = tl.arange(0, BR)
    p_rows = p_table + o_row.to(tl.int64)[:, None] * row_stride + o_r[None, :]
    return tl.load(p_rows, mask=seen[:, None] & (o_r < R)[None, :], other=0.0)
