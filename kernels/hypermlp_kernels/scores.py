"""The score maps of a program's rows, made again tile by tile: by key, turned to columns, and mixed."""

from typing import NamedTuple

import triton
import triton.language as tl

from hypermlp_kernels.blocks import head_of, load_keys, load_rows
from hypermlp_kernels.mixing import Mixing, mix, mixing_of
from hypermlp_kernels.selection import LOG2E
from hypermlp_kernels.skew import high_float, low_float, pack, rotate, rotate_halves, rotate_one, rotation_index


class Maps(NamedTuple):
    """A tile of a head's gate and scale map. With one map both are it; packed, both are the words that hold the two."""

    gate: tl.tensor
    scale: tl.tensor


class Scores(NamedTuple):
    """What scores are made of: the rows' queries and the keys of both maps, and where the rotation finds them."""

    b_qg: tl.tensor
    b_qs: tl.tensor
    kg: tl.tensor
    ks: tl.tensor
    b_index: tl.tensor


class Routing(NamedTuple):
    """The first mixing of both maps; with one map both are it."""

    gate: Mixing
    scale: Mixing


@triton.jit
def queries_of(q, k, rows, ALIGNED: tl.constexpr, C: tl.constexpr):
    """The rows' queries of both maps, ``[BM, BK]``, and the heads of the keys that they meet."""
    kg = head_of(k, rows, rows.i_h, ALIGNED)
    ks = head_of(k, rows, rows.i_h + rows.num_heads, ALIGNED)
    b_qg = load_rows(head_of(q, rows, rows.i_h, ALIGNED), rows.i0, rows.n, C.K, C.BM, C.BK)
    b_qs = b_qg
    if C.GLU:
        b_qs = load_rows(head_of(q, rows, rows.i_h + rows.num_heads, ALIGNED), rows.i0, rows.n, C.K, C.BM, C.BK)
    return b_qg, b_qs, kg, ks


@triton.jit
def scores_of(queries, rows, t_first, C: tl.constexpr, TURN: tl.constexpr, CHAINED: tl.constexpr):
    """:class:`Scores` of the rows, whose first key tile is ``t_first``, from what :func:`queries_of` made.

    ``TURN`` is how :func:`turned` does it. ``CHAINED``: by two products, one added to the other. As in loops the
    compiler splits rows alone among the warps then; of one product columns too, and every turned tile changes hands.
    """
    BM: tl.constexpr = C.BM
    BN: tl.constexpr = C.BN
    b_qg, b_qs, kg, ks = queries
    if CHAINED:
        # of zeros: what is read of the queries before a loop, Triton 3.9 keeps in registers through it
        b_rows, b_keys = tl.zeros((BM, 16), b_qg.dtype), tl.zeros((16, BN), b_qg.dtype)
        b_anchor = tl.dot(b_rows, b_keys, input_precision=C.PRECISION, out_dtype=C.ACC)
        b_anchor = tl.dot(b_rows, b_keys, b_anchor, input_precision=C.PRECISION, out_dtype=C.ACC)
    else:
        b_keys = load_keys(kg, t_first, rows.n, C.K, C.BN, C.BK)
        b_anchor = tl.dot(b_qg, b_keys, input_precision=C.PRECISION, out_dtype=C.ACC)
    return Scores(b_qg, b_qs, kg, ks, rotation_index(b_anchor, C.BM, C.BN, C.ASM, TURN))


@triton.jit
def routing_of(p_scale, p_up, p_z, gate, rows, C: tl.constexpr, M: tl.constexpr):
    """:class:`Routing` of the rows; scale maps count in units of 1 / ln 2 from here on."""
    num_maps = rows.num_heads * 2 if C.GLU else rows.num_heads
    of_gate = mixing_of(p_scale, p_up, p_z, gate, rows.i_h, num_maps, 1.0, rows, C, M)
    of_scale = of_gate
    if C.GLU:
        of_scale = mixing_of(p_scale, p_up, p_z, gate, rows.i_h + rows.num_heads, num_maps, LOG2E, rows, C, M)
    return Routing(of_gate, of_scale)


@triton.jit
def no_columns(C: tl.constexpr):
    """What :func:`score_columns` takes for the tile before the first."""
    BM: tl.constexpr = C.BM
    BN: tl.constexpr = C.BN
    b_last = tl.zeros((BM, BN), tl.int32 if C.PACKED else C.ACC)
    return Maps(b_last, b_last)


@triton.jit
def score_words(s, t, n, C: tl.constexpr):
    """Scores of a key tile, by key, as 32-bit words."""
    b_keys = load_keys(s.kg, t, n, C.K, C.BN, C.BK)
    b_gate = tl.dot(s.b_qg, b_keys, input_precision=C.PRECISION, out_dtype=C.ACC)
    b_scale = b_gate
    if C.GLU:
        b_keys = load_keys(s.ks, t, n, C.K, C.BN, C.BK)
        b_scale = tl.dot(s.b_qs, b_keys, input_precision=C.PRECISION, out_dtype=C.ACC)
        if C.PACKED:
            b_gate = pack(b_gate, b_scale, C.ASM)
            b_scale = b_gate
    return Maps(b_gate, b_scale)


@triton.jit
def score_columns(s, last, t, n, C: tl.constexpr, TURN: tl.constexpr):
    """A tile's words in column order, and what the next tile takes as ``last``; of a ``TURN`` see :func:`turned`.

    By lag the last key tile holds the larger lags of this one's window; it starts as zero.
    """
    words = score_words(s, t, n, C)
    if C.BY_LAG:
        b_gate, b_last = turned(words.gate, last.gate, s.b_index, C, TURN)
        if C.GLU and not C.PACKED:
            b_scale, b_last_scale = turned(words.scale, last.scale, s.b_index, C, TURN)
            return Maps(b_gate, b_scale), Maps(b_last, b_last_scale)
        else:  # noqa: RET505  a compile-time branch
            return Maps(b_gate, b_gate), Maps(b_last, last.scale)
    else:
        return words, last


@triton.jit
def turned(b_x, b_last, b_index, C: tl.constexpr, TURN: tl.constexpr):
    """A tile of words by key in column order, and what the next one takes as ``b_last``.

    The tile and the last are turned together (``"both"``). Where shared memory for two would cost a program its place
    there are ``"halves"``, of two tiles with half the rows, or ``"one"``, which costs registers for its addresses.
    """
    if TURN == "both":
        return rotate(b_x, b_last, b_index, C.BM, C.BN), b_x
    elif TURN == "halves":  # noqa: RET505  a compile-time branch
        return rotate_halves(b_x, b_last, b_index, C.BM, C.BN), b_x
    else:
        current = tl.arange(0, C.BN)[None, :] <= (tl.arange(0, C.BM) % C.BN)[:, None]
        b_turned = rotate_one(b_x, b_index, C.BM, C.BN)
        return tl.where(current, b_turned, b_last), b_turned


@triton.jit
def as_floats(words, C: tl.constexpr):
    """Both score maps in the accumulator's type."""
    if C.PACKED:
        return Maps(low_float(words.gate), high_float(words.gate))
    else:  # noqa: RET505  a compile-time branch
        return words


@triton.jit
def mixed_maps(words, routing, x0, max_lag, C: tl.constexpr, M: tl.constexpr):
    """``y``: both maps after the first mixing, hidden elements not yet replaced."""
    scores = as_floats(words, C)
    b_gate = mix(scores.gate, routing.gate, x0, max_lag, 1.0, C, M)
    b_scale = scores.scale
    if C.GLU:
        b_scale = mix(scores.scale, routing.scale, x0, max_lag, LOG2E, C, M)
    return b_gate, b_scale
