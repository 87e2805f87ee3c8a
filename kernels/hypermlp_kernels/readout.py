"""The readout: maps made again from the row statistics, and their product with the values.

Nothing of size ``T x T`` is stored. A program owns ``BM`` query rows and ``BV`` value channels of one
head. By lag the weights of key tile ``t - 1`` come from the lag windows of key tiles ``t - 1`` and
``t``, so the product runs one tile behind the scores.
"""

import triton
import triton.language as tl

from hypermlp_kernels.blocks import (
    Stream,
    compact_head,
    first_column,
    first_token,
    head_of,
    inverse_norm,
    key_tiles,
    locate,
)
from hypermlp_kernels.mixing import mix, mixing_of
from hypermlp_kernels.scores import mixed_maps, no_columns, queries_of, routing_of, score_columns, scores_of
from hypermlp_kernels.selection import LN2, select
from hypermlp_kernels.skew import rotate
from hypermlp_kernels.visibility import hide


@triton.jit
def bad_tokens(p_count, rows):
    """How many of the sequence's tokens before each hold a NaN or an infinity, from ``[B, T + 1, H]``."""
    return p_count + (first_token(rows) + rows.i_b) * rows.num_heads + rows.i_h


@triton.jit
def load_values(
    v, p_bad, t, i_v, rows, V: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, EDGE: tl.constexpr = True
):  # fmt: skip
    """``[BN, BV]``: a tile of values, channel block ``i_v``, zero for tokens that hold a NaN or an infinity.

    A hidden key has weight zero, and zero times NaN is NaN. Where no key is hidden from any row (not at an ``EDGE``),
    such a token is left as it is: all rows become NaN anyway.
    """
    o_j = t * BN + tl.arange(0, BN)
    o_v = i_v * BV + tl.arange(0, BV)
    p_first = v.p + tl.cast(t * BN, tl.int64) * v.token
    p_tile = p_first + tl.arange(0, BN)[:, None] * v.token + o_v[None, :]
    if EDGE:
        inside = o_j.to(tl.uint32) < rows.n.to(tl.uint32)
        before = tl.load(p_bad + o_j * rows.num_heads, mask=inside, other=0)
        after = tl.load(p_bad + (o_j + 1) * rows.num_heads, mask=inside, other=0)
        mask = (inside & (before == after))[:, None]
        if V % BV != 0:
            mask = mask & (o_v < V)[None, :]
        b_v = tl.load(p_tile, mask=mask, other=0.0)
    elif V % BV != 0:
        b_v = tl.load(p_tile, mask=(o_v < V)[None, :], other=0.0)
    else:
        b_v = tl.load(p_tile)
    return b_v


@triton.jit
def store_output(b_o, o_next, inside, p_o, p_bad, i_v, rows, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr):
    """Store a block of output ``[B, T, H, V]``; a row that sees a value that is not finite becomes NaN.

    ``o_next`` is the token after each row, ``inside`` which of the rows there are: callers write both in a form of
    their own, since what a loop's beginning has computed alike, the compiler keeps through the loop, or spills.
    """
    BM: tl.constexpr = C.BM
    o_m = tl.arange(0, BM)
    o_last = o_next
    o_first = tl.zeros((BM,), tl.int32)
    if C.BY_LAG:
        o_first = tl.maximum(o_last - rows.max_lag, 0)
    if not C.CAUSAL:
        o_last = tl.zeros((BM,), tl.int32) + rows.n
    seen_bad = tl.load(p_bad + o_last * rows.num_heads, mask=inside, other=0)
    seen_bad = seen_bad - tl.load(p_bad + o_first * rows.num_heads, mask=inside, other=0)
    b_o = tl.where((seen_bad > 0)[:, None], float("nan"), b_o)
    o = compact_head(p_o, rows, rows.i_h, rows.num_heads, V)
    o_v = i_v * BV + tl.arange(0, BV)
    mask = inside[:, None] & (o_v < V)[None, :]
    p_first = o.p + rows.i0.to(tl.int64) * o.token
    tl.store(p_first + o_m[:, None] * o.token + o_v[None, :], b_o.to(p_o.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "length", "max_lag", "num_blocks", "q_batch", "q_head", "k_batch", "k_head", "v_batch", "v_head",
        "gate1_batch", "gate1_head", "gate2_batch", "gate2_head",
    ]
)  # fmt: skip
def readout_kernel(
    p_q, p_k, p_v, p_scale1, p_up1, p_gate1, p_z1, p_scale2, p_up2, p_gate2, p_z2, p_rho, p_count, p_o,
    p_blocks, p_valid,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    gate1_batch, gate1_token, gate1_head, gate2_batch, gate2_token, gate2_head,
    length, max_lag, num_blocks, num_heads,
    V: tl.constexpr, BV: tl.constexpr, EARLY: tl.constexpr, ALIGNED: tl.constexpr, ALIGNED_VALUES: tl.constexpr,
    C: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr,
):  # fmt: skip
    """``o_i = sum_l w_i[l] v_{i-l} / rho_i`` of a head, ``[B, T, H, V]`` contiguous.

    ``EARLY`` divides the weights, not the output, by ``rho``: float16 would overflow.
    """
    BM: tl.constexpr = C.BM
    BN: tl.constexpr = C.BN
    rows = locate(p_blocks, length, max_lag, num_blocks, num_heads, C)
    if rows.i0 >= rows.n:
        return
    q, k = Stream(p_q, q_batch, q_token, q_head), Stream(p_k, k_batch, k_token, k_head)
    v = head_of(Stream(p_v, v_batch, v_token, v_head), rows, rows.i_h, ALIGNED_VALUES)
    p_bad = bad_tokens(p_count, rows)
    gate1 = Stream(p_gate1, gate1_batch, gate1_token, gate1_head)
    gate2 = Stream(p_gate2, gate2_batch, gate2_token, gate2_head)
    queries = queries_of(q, k, rows, ALIGNED, C)
    routing = routing_of(p_scale1, p_up1, p_z1, gate1, rows, C, M1)
    readout = mixing_of(p_scale2, p_up2, p_z2, gate2, rows.i_h, num_heads, 1.0, rows, C, M2)
    b_inverse = tl.full((BM,), 1.0, C.ACC)
    if C.NORM:
        b_inverse = inverse_norm(p_rho, rows, C)
    t_first, t_stop = key_tiles(rows, C)
    if C.BY_LAG:
        t_stop += 1
    scores = scores_of(queries, rows, t_first, C, "both", C.CHAINED and tl.bfloat16 == C.MIX)

    last = no_columns(C)
    b_last_weights = tl.zeros((BM, BN), C.ACC)
    b_o = tl.zeros((BM, BV), C.ACC)
    for t in tl.range(t_first, t_stop, num_stages=C.STAGES):
        words, last = score_columns(scores, last, t, rows.n, C, "both")
        x0 = first_column(t, rows, C)
        b_gate, b_scale = mixed_maps(words, routing, x0, max_lag, C, M1)
        b_a = select(b_gate, b_scale, C.GLU, C.PRECISION == "ieee", C.ASM)
        b_weights = mix(b_a, readout, x0, max_lag, LN2 if C.GLU else 1.0, C, M2)
        b_weights = hide(b_weights, t, rows, p_valid, C)
        t_value = t
        if C.BY_LAG:
            t_value = t - 1
            b_turned = rotate(b_last_weights, b_weights, scores.b_index, C.BM, C.BN)
            b_last_weights = b_weights
            b_weights = b_turned
        if EARLY:
            b_weights = b_weights * b_inverse[:, None]
        b_v = load_values(v, p_bad, t_value, tl.program_id(1), rows, V, C.BN, BV)
        b_o = tl.dot(b_weights.to(b_v.dtype), b_v, b_o, input_precision=C.PRECISION, out_dtype=C.ACC)

    if C.NORM and not EARLY:
        b_o = b_o * b_inverse[:, None]
    o_m = tl.arange(0, BM)
    store_output(b_o, rows.i0 + 1 + o_m, rows.i0 + 1 + o_m <= rows.n, p_o, p_bad, tl.program_id(1), rows, V, BV, C)
