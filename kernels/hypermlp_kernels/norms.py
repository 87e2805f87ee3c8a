"""Norms that a sum of squares does not hold: made again, in two units, where a row is that large or small."""

import triton
import triton.language as tl

from hypermlp_kernels.blocks import Stream, first_column, key_tiles, locate, row_offsets
from hypermlp_kernels.mixing import mix, mixing_of
from hypermlp_kernels.scores import no_columns, queries_of, score_columns, scores_of
from hypermlp_kernels.selection import LARGE, SMALL, norm_of
from hypermlp_kernels.visibility import hide

# beyond these a sum of float32 squares loses digits, or all
_LEAST = tl.constexpr(2.0**-44)
_MOST = tl.constexpr(2.0**60)


@triton.jit(
    do_not_specialize=[
        "length", "max_lag", "num_blocks", "eps", "q_batch", "q_head", "k_batch", "k_head", "gate1_batch", "gate1_head",
    ]
)  # fmt: skip
def extreme_norms_kernel(
    p_q, p_k, p_scale1, p_up1, p_gate1, p_z1, p_rho, p_blocks, p_valid,
    q_batch, q_token, q_head, k_batch, k_token, k_head, gate1_batch, gate1_token, gate1_head,
    length, max_lag, num_blocks, num_heads, num_maps, eps,
    ALIGNED: tl.constexpr, C: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """``rho`` ``[B, T, H]`` again where it is extreme, of gate maps alone: of nearly all blocks it is only read."""
    BM: tl.constexpr = C.BM
    rows = locate(p_blocks, length, max_lag, num_blocks, num_heads, C)
    if rows.i0 >= rows.n:
        return
    o_row, inside = row_offsets(rows, C.BM)
    b_rho = tl.load(p_rho + o_row, mask=inside, other=1.0)
    extreme = (b_rho < _LEAST) | (b_rho > _MOST)
    if tl.max(extreme.to(tl.int32)) == 0:
        return
    q, k = Stream(p_q, q_batch, q_token, q_head), Stream(p_k, k_batch, k_token, k_head)
    gate = Stream(p_gate1, gate1_batch, gate1_token, gate1_head)
    queries = queries_of(q, k, rows, ALIGNED, C)
    routing = mixing_of(p_scale1, p_up1, p_z1, gate, rows.i_h, num_maps, 1.0, rows, C, M)
    t_first, t_stop = key_tiles(rows, C)
    scores = scores_of(queries, rows, t_first, C, "one", False)

    last = no_columns(C)
    b_small = tl.zeros((BM,), C.ACC)
    b_large = b_small
    for t in tl.range(t_first, t_stop, num_stages=C.STAGES):
        words, last = score_columns(scores, last, t, rows.n, C, "one")
        b_gate = mix(words.gate, routing, first_column(t, rows, C), max_lag, 1.0, C, M)
        b_gate = hide(b_gate, t, rows, p_valid, C)
        b_up = b_gate * (1.0 / SMALL)
        b_down = b_gate * (1.0 / LARGE)
        b_small += tl.sum(b_up * b_up, axis=1)
        b_large += tl.sum(b_down * b_down, axis=1)
    b_again = norm_of(b_small, b_large)
    tl.store(p_rho + o_row, tl.where(b_again <= eps, eps, b_again), mask=inside & extreme)
