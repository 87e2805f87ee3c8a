"""The map stored: activated once, kept in a scratch of a bounded size, and read by every block of values.

A *slot* of the scratch holds ``SLOT`` rows of one head over ``pitch`` columns (lags, or keys by position), in
blocks of 16 rows by 16 columns: the same columns whatever the tiles of the kernel that writes and of the one
that reads. Inside a block the elements are in the order of the accumulator's registers, so a thread's share
is consecutive and a tile goes to memory and back without a conversion of layouts.
"""

import triton
import triton.language as tl

from hypermlp_kernels.blocks import Stream, first_column, from_row, head_of, inverse_norm, key_tiles, place
from hypermlp_kernels.mixing import mix, mixing_index, mixing_of
from hypermlp_kernels.readout import bad_tokens, load_values, store_output
from hypermlp_kernels.selection import LN2
from hypermlp_kernels.skew import rotate
from hypermlp_kernels.visibility import stretches, visible


@triton.jit
def locate_slot(
    i_program, p_blocks, first_slot, length, max_lag, num_blocks, num_rest, num_heads,
    SLOT: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Rows of a program of a chunk, and the first of them in the scratch: longest rows first over all heads."""
    slot = i_program // (SLOT // C.BM)
    slot_row = i_program % (SLOT // C.BM) * C.BM
    i_slot = first_slot + slot
    i_block = num_blocks - 1 - i_slot // num_rest
    rows = place(p_blocks, i_block, i_slot % num_rest, length, max_lag, num_heads, SLOT, C)
    return from_row(rows, rows.i0 + slot_row), slot.to(tl.int64) * SLOT + slot_row


@triton.jit
def to_fragments(b_x, BM: tl.constexpr, BN: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile flattened: by ``COLUMNS`` columns, by 16 rows, by lane, and 16 bytes of each lane together."""
    parts = tl.reshape(b_x, (BM // 16, 2, 8, BN // COLUMNS, COLUMNS // 8, 4, 2))
    return tl.reshape(tl.permute(parts, (3, 0, 2, 5, 4, 1, 6)), (BM * BN,))


@triton.jit
def from_fragments(b_x, BM: tl.constexpr, BN: tl.constexpr, COLUMNS: tl.constexpr):
    """Inverse of :func:`to_fragments`."""
    parts = tl.reshape(b_x, (BN // COLUMNS, BM // 16, 8, 4, COLUMNS // 8, 2, 2))
    return tl.reshape(tl.permute(parts, (1, 5, 2, 0, 4, 3, 6)), (BM, BN))


@triton.jit
def fragment_offsets(x0, pitch, COLUMNS: tl.constexpr, C: tl.constexpr):
    """Where a tile's fragments lie from the scratch of its first row on, and which of them are there."""
    o = tl.arange(0, C.BM * C.BN)
    o_row = o // (16 * COLUMNS) % (C.BM // 16) * 16
    o_x = x0 + o // (COLUMNS * C.BM) * COLUMNS
    if C.BY_LAG:
        o_x += o_row // C.BN * C.BN
    return o_row * pitch + o_x * 16 + o % (16 * COLUMNS), o_x.to(tl.uint32) < pitch.to(tl.uint32)


@triton.jit
def store_map(p_map, b_a, slot_row, x0, pitch, C: tl.constexpr):
    """Store a tile of the map in column order, from a row of the scratch and column ``x0`` of the first group on."""
    COLUMNS: tl.constexpr = 16 if p_map.dtype.element_ty.primitive_bitwidth == 16 else 8
    offsets, inside = fragment_offsets(x0, pitch, COLUMNS, C)
    b_a = to_fragments(b_a.to(p_map.dtype.element_ty), C.BM, C.BN, COLUMNS)
    tl.store(p_map + slot_row * pitch + offsets, b_a, mask=inside)


@triton.jit
def load_map(p_map, slot_row, x0, pitch, C: tl.constexpr, EDGE: tl.constexpr):
    """What :func:`store_map` stored. Elements that no row sees may hold anything."""
    COLUMNS: tl.constexpr = 16 if p_map.dtype.element_ty.primitive_bitwidth == 16 else 8
    offsets, inside = fragment_offsets(x0, pitch, COLUMNS, C)
    b_a = tl.load(p_map + slot_row * pitch + offsets, mask=inside if EDGE else None, other=0.0 if EDGE else None)
    return from_fragments(b_a, C.BM, C.BN, COLUMNS)


@triton.jit(
    do_not_specialize=[
        "length", "max_lag", "num_blocks", "num_rest", "first_slot", "pitch",
        "v_batch", "v_head", "gate2_batch", "gate2_head",
    ]
)  # fmt: skip
def stored_readout_kernel(
    p_map, p_v, p_scale2, p_up2, p_gate2, p_z2, p_rho, p_count, p_o, p_blocks, p_valid,
    v_batch, v_token, v_head, gate2_batch, gate2_token, gate2_head,
    length, max_lag, num_blocks, num_heads, num_rest, first_slot, pitch, value_blocks,
    V: tl.constexpr, BV: tl.constexpr, SLOT: tl.constexpr, EARLY: tl.constexpr, ALIGNED_VALUES: tl.constexpr,
    C: tl.constexpr, M2: tl.constexpr,
):  # fmt: skip
    """``o_i = sum_l w_i[l] v_{i-l} / rho_i`` of a head, as ``readout_kernel``, from the stored map.

    Keys are walked from the last: the weights of key tile ``t`` are those of the lag windows of ``t`` and
    ``t + 1``, and past the last key all are zero. The blocks of values of the same rows run side by side.
    """
    BM: tl.constexpr = C.BM
    BN: tl.constexpr = C.BN
    STRETCHES: tl.constexpr = 1 if C.HOLES else 3
    i_v = tl.program_id(0) % value_blocks
    rows, slot_row = locate_slot(
        tl.program_id(0) // value_blocks, p_blocks, first_slot, length, max_lag, num_blocks, num_rest, num_heads,
        SLOT, C,
    )  # fmt: skip
    if rows.i0 >= rows.n:
        return
    v = head_of(Stream(p_v, v_batch, v_token, v_head), rows, rows.i_h, ALIGNED_VALUES)
    p_bad = bad_tokens(p_count, rows)
    b_inverse = tl.full((BM,), 1.0, C.ACC)
    if C.NORM and EARLY:
        b_inverse = inverse_norm(p_rho, rows, C)
    t_first, t_stop = key_tiles(rows, C)

    gate2 = Stream(p_gate2, gate2_batch, gate2_token, gate2_head)
    readout = mixing_of(p_scale2, p_up2, p_z2, gate2, rows.i_h, num_heads, 1.0, rows, C, M2)
    b_index = mixing_index(readout, 0, max_lag, C.ASM and M2.R > 0, C, M2)
    b_next = tl.zeros((BM, BN), C.ACC)
    b_o = tl.zeros((BM, BV), C.ACC)
    bounds = stretches(rows, t_first, t_stop, C)
    for i in tl.static_range(STRETCHES):
        for back in tl.range(0, bounds[STRETCHES - i] - bounds[STRETCHES - 1 - i], num_stages=C.STAGES):
            t = bounds[STRETCHES - i] - 1 - back
            x0 = first_column(t, rows, C)
            b_a = load_map(p_map, slot_row, x0, pitch, C, i != 1).to(C.ACC)
            b_weights = mix(b_a, readout, x0, max_lag, LN2 if C.GLU else 1.0, C, M2, i != 1)
            if i != 1:
                b_weights = tl.where(visible(t, rows, p_valid, C), b_weights, 0)
            if EARLY:
                b_weights = b_weights * b_inverse[:, None]
            if C.BY_LAG:
                b_turned = rotate(b_weights, b_next, b_index, C.BM, C.BN)
                b_next = b_weights
                b_weights = b_turned
            b_v = load_values(v, p_bad, t, i_v, rows, V, C.BN, BV, i != 1)
            b_o = tl.dot(b_weights.to(b_v.dtype), b_v, b_o, input_precision=C.PRECISION, out_dtype=C.ACC)

    if C.NORM and not EARLY:
        b_o = b_o * inverse_norm(p_rho, rows, C)[:, None]
    o_m = tl.arange(0, BM)
    store_output(b_o, rows.i0 + o_m + 1, rows.i0 + o_m < rows.n, p_o, p_bad, i_v, rows, V, BV, C)
