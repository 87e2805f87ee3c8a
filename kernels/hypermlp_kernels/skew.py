"""The skew: from keys to lags and back, inside a tile, by one rotation of each row.

Row ``m`` of a score tile holds keys ``t * BN + n``. Seen from query ``i0 + m`` that key has lag
``base + m - n`` with ``base = i0 - t * BN``, so column ``c = (m - n) mod BN`` of the rotated tile
holds lag ``base + c`` where ``n <= m``, and ``base - BN + c`` (the next key tile's window) elsewhere:

    lags base .. base + BN - 1  =  where(c <= m, rotated S_t, rotated S_{t-1})

The map ``n -> (m - n) mod BN`` is its own inverse, and ``c <= m`` where ``n <= m``: the same index turns keys into
lags and lags into keys. With several groups of ``BN`` rows, ``m`` counts within the group. ``kernels/README.md``
draws it.

The rotation is a gather along two *flattened* tiles that lie side by side: of the two together, row ``m`` has its
column ``c`` at ``BN + m - c``. A gather of rank one always goes through shared memory, in 32-bit words. The flat order
is that of the accumulator's registers, so flattening moves no data, and its low five bits are ``(row mod 8, column pair
mod 4)``: a warp's 32 words fall into 32 banks, on the way in and on the way out.
"""

import triton
import triton.language as tl


@triton.jit
def pack(b_low, b_high, ASM: tl.constexpr):
    """Two float32 tiles as one of 32-bit words: bfloat16 ``b_low`` in the low half, ``b_high`` in the high."""
    if ASM:
        # one conversion; through tl.to it would be two on a pipe of a quarter the rate, and shifts
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [b_low, b_high], dtype=tl.int32, is_pure=True, pack=1
        )
    else:  # noqa: RET505  a compile-time branch: without else both would be compiled
        low = b_low.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)
        high = b_high.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)
        return (low | (high << 16)).to(tl.int32, bitcast=True)


@triton.jit
def low_half(b_word):
    return (b_word & 0xFFFF).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def high_half(b_word):
    return (b_word.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def low_float(b_word):
    return (b_word << 16).to(tl.float32, bitcast=True)


@triton.jit
def high_float(b_word):
    return (b_word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def rotation_index(b_like, BM: tl.constexpr, BN: tl.constexpr, ASM: tl.constexpr, TURN: tl.constexpr = "both"):
    """Where :func:`rotate` finds each element, ``[BM * BN]`` int32; of a ``TURN`` see ``scores.turned``.

    ``b_like`` is a float32 tile that a dot made. Its values do not matter: a zero made of them ties the index, and
    through it the rotated tile, to the registers dots read from. Triton does not see the zero, but LLVM does.
    """
    o_m = tl.arange(0, BM)[:, None]
    o_c = tl.arange(0, BN)[None, :]
    if TURN != "one":
        # side by side no row begins again: eight columns on it is 64 less, an address of the thread's and a constant
        o_n = BN + o_m % BN - (o_c - o_c // 8 * 8)
        index = (o_m // 8 * (BN // 4) + (o_n >> 3)) * 64 + (o_n & 1) * 32 + o_m % 8 * 4 + ((o_n >> 1) & 3)
        index -= o_c // 8 * 64
        if TURN == "halves":
            # of the other half no row is there
            index -= (o_m // 8 - o_m // 16) * (BN // 4 * 64)
    else:
        o_n = (o_m - o_c + BN * (BM // BN)) % BN
        index = (((o_m // 8) * (BN // 8) + o_n // 8) * 2 + o_n % 2) * 32 + (o_m % 8) * 4 + (o_n // 2) % 4
    if ASM:
        index += ((b_like.to(tl.uint32, bitcast=True) & 1) >> 1).to(tl.int32)
    return tl.reshape(index, (BM * BN,))


@triton.jit
def rotate(b_x, b_other, b_index, BM: tl.constexpr, BN: tl.constexpr):
    """``out[m, c] = x[m, (m - c) mod BN]`` for ``c <= m``, elsewhere of ``other``: tiles of 32-bit elements."""
    both = tl.reshape(tl.join(b_other, b_x), (BM // 8, 8, BN // 8, 4, 2, 2))
    registers = tl.permute(both, (0, 5, 2, 4, 1, 3))
    return tl.reshape(tl.gather(tl.reshape(registers, (2 * BM * BN,)), b_index, 0), (BM, BN))


@triton.jit
def rotate_halves(b_x, b_other, b_index, BM: tl.constexpr, BN: tl.constexpr):
    """:func:`rotate` with half the shared memory: first the upper eight of every sixteen rows, then the lower."""
    both = tl.reshape(tl.join(b_other, b_x), (BM // 16, 2, 8, BN // 8, 4, 2, 2))
    upper, lower = tl.split(tl.permute(both, (0, 6, 3, 5, 2, 4, 1)))
    upper_index, lower_index = tl.split(tl.permute(tl.reshape(b_index, (BM // 16, 2, 8 * BN)), (0, 2, 1)))
    upper = tl.gather(tl.reshape(upper, (BM * BN,)), tl.reshape(upper_index, (BM * BN // 2,)), 0)
    lower = tl.gather(tl.reshape(lower, (BM * BN,)), tl.reshape(lower_index, (BM * BN // 2,)), 0)
    return tl.reshape(tl.permute(tl.reshape(tl.join(upper, lower), (BM // 16, 8 * BN, 2)), (0, 2, 1)), (BM, BN))


@triton.jit
def rotate_one(b_x, b_index, BM: tl.constexpr, BN: tl.constexpr):
    """``out[m, c] = x[m, (m - c) mod BN]``, with half the shared memory of :func:`rotate`."""
    registers = tl.permute(tl.reshape(b_x, (BM // 8, 8, BN // 8, 4, 2)), (0, 2, 4, 1, 3))
    return tl.reshape(tl.gather(tl.reshape(registers, (BM * BN,)), b_index, 0), (BM, BN))
