"""The map stored: activated once, kept in a scratch of a bounded size, and read by every block of values.

A *slot* of the scratch holds ``SLOT`` rows of one head over ``pitch`` columns (lags, or keys by position), in
blocks of 16 rows by 16 columns: the same columns whatever the tiles of the kernel that writes and of the one
that reads. Inside a block the elements are in the order of the accumulator's registers, so a thread's share
is consecutive and a tile goes to memory and back without a conversion of layouts.
"""

import triton
import triton.language as tl

from hypermlp_kernels.blocks import LN2, gated_statistic, head_of, key_tiles, mix, place
from hypermlp_kernels.readout import load_values, store_output
from hypermlp_kernels.skew import rotate, rotation_index
from hypermlp_kernels.visibility import hide


@triton.jit
def locate_slot(
    i_program, p_blocks, first_slot, length, num_blocks, num_rest, num_heads,
    HAS_BLOCKS: tl.constexpr, SLOT: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """:func:`place` of a program of a chunk, and its first row in the scratch: longest rows first over all heads."""
    slot = i_program // (SLOT // BM)
    row = i_program % (SLOT // BM) * BM
    i_slot = first_slot + slot
    i_b, i_h, start, n, i0 = place(
        p_blocks, num_blocks - 1 - i_slot // num_rest, i_slot % num_rest, length, num_heads, HAS_BLOCKS, SLOT
    )
    return i_b, i_h, start, n, i0 + row, slot.to(tl.int64) * SLOT + row


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
def fragment_offsets(
    x0, pitch, BY_LAG: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Where a tile's fragments lie from the scratch of its first row on, and which of them are there."""
    o = tl.arange(0, BM * BN)
    o_row = o // (16 * COLUMNS) % (BM // 16) * 16
    o_x = x0 + o // (COLUMNS * BM) * COLUMNS
    if BY_LAG:
        o_x += o_row // BN * BN
    return o_row * pitch + o_x * 16 + o % (16 * COLUMNS), (o_x >= 0) & (o_x < pitch)


@triton.jit
def store_map(
    p_map, b_a, row, x0, pitch, BY_LAG: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Store a tile of the map in column order, from scratch row ``row`` and column ``x0`` of the first group on."""
    COLUMNS: tl.constexpr = 16 if p_map.dtype.element_ty.primitive_bitwidth == 16 else 8
    offsets, inside = fragment_offsets(x0, pitch, BY_LAG, BM, BN, COLUMNS)
    b_a = to_fragments(b_a.to(p_map.dtype.element_ty), BM, BN, COLUMNS)
    tl.store(p_map + row * pitch + offsets, b_a, mask=inside)


@triton.jit
def load_map(p_map, row, x0, pitch, BY_LAG: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """What :func:`store_map` stored. Elements that no row sees may hold anything."""
    COLUMNS: tl.constexpr = 16 if p_map.dtype.element_ty.primitive_bitwidth == 16 else 8
    offsets, inside = fragment_offsets(x0, pitch, BY_LAG, BM, BN, COLUMNS)
    return from_fragments(tl.load(p_map + row * pitch + offsets, mask=inside, other=0.0), BM, BN, COLUMNS)


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
    V: tl.constexpr, R2: tl.constexpr,
    GLU: tl.constexpr, BY_LAG: tl.constexpr, CAUSAL: tl.constexpr, HAS_BLOCKS: tl.constexpr, HOLES: tl.constexpr,
    SCALE2: tl.constexpr, GATED2: tl.constexpr, NORM: tl.constexpr,
    ASM: tl.constexpr, ACC: tl.constexpr, MIX: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
    ALIGNED_VALUES: tl.constexpr,
    SLOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, BR2: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``o_i = sum_l w_i[l] v_{i-l} / rho_i`` of a head, as ``readout_kernel``, from the stored map.

    Keys are walked from the last: the weights of key tile ``t`` are those of the lag windows of ``t`` and
    ``t + 1``, and past the last key all are zero. The blocks of values of the same rows run side by side.
    """
    NG: tl.constexpr = BM // BN if BY_LAG else 1
    LOW_RANK2: tl.constexpr = R2 > 0
    i_v = tl.program_id(0) % value_blocks
    i_b, i_h, start, n, i0, row = locate_slot(
        tl.program_id(0) // value_blocks, p_blocks, first_slot, length, num_blocks, num_rest, num_heads,
        HAS_BLOCKS, SLOT, BM,
    )  # fmt: skip
    if i0 >= n:
        return
    first_token = i_b * length + start
    p_vh = head_of(p_v, i_b, start, i_h, v_batch, v_token, v_head, ALIGNED_VALUES)
    p_scale = p_scale2 + i_h * max_lag
    p_up = p_up2 + i_h * max_lag * BR2
    p_hole = p_valid + first_token
    p_bad = p_count + (i_b * (length + 1) + start) * num_heads + i_h
    o_m = tl.arange(0, BM)
    o_row = ((first_token + i0) * num_heads + i_h) + o_m.to(tl.int64) * num_heads
    b_inverse = tl.full((BM,), 1.0, ACC)
    if NORM:
        b_inverse = 1.0 / tl.load(p_rho + o_row, mask=i0 + o_m < n, other=1.0)
    t_first, t_stop = key_tiles(i0, n, max_lag, BY_LAG, CAUSAL, BM, BN)

    b_w2 = tl.zeros((BM, BN), ACC)
    b_anchor = b_w2
    if LOW_RANK2:
        p_z = p_z2 + (first_token * num_heads + i_h) * R2
        p_gate = head_of(p_gate2, i_b, start, i_h, gate2_batch, gate2_token, gate2_head, False)
        b_w2 = gated_statistic(
            p_z, p_gate, i0, n, num_heads * R2, gate2_token, 1.0, R2, GATED2, MIX, BM, NG, BR2
        )  # fmt: skip
        b_anchor = mix(b_anchor, b_w2, p_scale, p_up, 0, max_lag, 1.0, "zero", True, PRECISION, NG, BN, BR2)
    b_index = rotation_index(b_anchor, BM, BN, ASM and LOW_RANK2)
    current = tl.arange(0, BN)[None, :] <= (o_m % BN)[:, None]
    b_next = tl.zeros((BM, BN), p_v.dtype.element_ty)
    b_o = tl.zeros((BM, BV), ACC)
    for i in tl.range(0, t_stop - t_first, num_stages=STAGES):
        t = t_stop - 1 - i
        x0 = i0 - t * BN if BY_LAG else t * BN
        b_a = load_map(p_map, row, x0, pitch, BY_LAG, BM, BN).to(ACC)
        b_weights = mix(
            b_a, b_w2, p_scale, p_up, x0, max_lag, LN2 if GLU else 1.0, SCALE2, LOW_RANK2, PRECISION, NG, BN, BR2
        )  # fmt: skip
        b_weights = hide(b_weights, i0, t, n, max_lag, p_hole, BY_LAG, CAUSAL, HOLES, BM, BN)
        if EARLY:
            b_weights = b_weights * b_inverse[:, None]
        if BY_LAG:
            b_turned = rotate(tl.where(current, b_weights, b_next.to(ACC)), b_index, BM, BN)
            b_next = b_weights.to(b_next.dtype)
            b_weights = b_turned
        b_v = load_values(p_vh, p_bad, t, i_v, n, v_token, num_heads, V, BN, BV)
        b_o = tl.dot(b_weights.to(b_v.dtype), b_v, b_o, input_precision=PRECISION, out_dtype=ACC)

    if NORM and not EARLY:
        b_o = b_o * b_inverse[:, None]
    p_first = p_o + (first_token * num_heads + i_h) * V
    store_output(b_o, p_first, p_bad, i0, i_v, n, max_lag, num_heads, V, BY_LAG, CAUSAL, BM, BV)
