"""Backward, the score maps: the activated map again, and from the weights' gradient those of both score maps.

Programs own ``BM`` query rows of one head, as in ``backward_rows``.
"""

import triton
import triton.language as tl

from hypermlp_kernels.backward_blocks import Planes, locate_in_chunk, store_statistic_gradient, tile_offsets
from hypermlp_kernels.backward_parts import part_of, store_part
from hypermlp_kernels.blocks import Stream, first_column, first_token, pick_group, row_offsets, table_rows
from hypermlp_kernels.mixing import mix, mixing_of
from hypermlp_kernels.scores import mixed_maps, no_columns, queries_of, routing_of, score_columns, scores_of
from hypermlp_kernels.selection import LN2, sigmoid2, softplus2
from hypermlp_kernels.visibility import hide_all


@triton.jit(
    do_not_specialize=[
        "length", "max_lag", "num_rest", "last", "origin", "full", "most", "plane", "span",
        "q_batch", "q_head", "k_batch", "k_head", "gate1_batch", "gate1_head",
    ]
)  # fmt: skip
def map_gradient_kernel(
    p_q, p_k, p_scale1, p_up1, p_gate1, p_z1, p_scale2, p_down2, p_dz2, p_pull,
    p_planes, p_dz1, p_dgate1, p_blocks, p_valid,
    q_batch, q_token, q_head, k_batch, k_token, k_head, gate1_batch, gate1_token, gate1_head,
    length, max_lag, num_rest, num_heads, last, origin, full, most, plane, span,
    GRADIENT: tl.constexpr, GATE_GRADIENT: tl.constexpr, ACTIVATED: tl.constexpr, SPLIT: tl.constexpr,
    ALIGNED: tl.constexpr, C: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr,
):  # fmt: skip
    """The maps again: the activated one (``ACTIVATED``) and the gradients of the mixed ones (``GRADIENT``).

    Plane 0 of ``p_planes`` holds ``dw``; 1 gets ``a`` before the norm; 2 and 3 get ``dy`` of the gate and
    the scale map; they lie ``plane`` tiles apart. With ``dy`` come the gradients of the first mixing's ``z``
    and ``gate``, ``[B, T, maps, R1]``. ``p_scale1`` counts scale maps in units of 1 / ln 2. ``p_pull``
    ``[B, T, H]`` is what ``rho`` adds: ``dg = da softplus(u) [g > 0] - pull g``.

    Of a part of the rows (``SPLIT``): ``p_dz1`` is the scratch of ``backward_parts`` for the gradients of
    ``gate z``, and what is made of them is left to ``add_parts_kernel``.
    """
    BM: tl.constexpr = C.BM
    WIDTH: tl.constexpr = C.NG * M1.BR
    # of tiles so large registers do not suffice
    LARGE: tl.constexpr = C.PACKED and C.BM >= 64
    # shared memory for both would cost a program its place, but where there is room for one alone
    LESS: tl.constexpr = "halves" if LARGE else "one"
    TURN: tl.constexpr = LESS if C.GLU and (C.NG == 1 or not C.PACKED) else "both"
    planes = Planes(num_rest, origin, full, most)
    rows, tile0 = locate_in_chunk(p_blocks, last, planes, length, max_lag, num_heads, C)
    part = part_of(rows, tile0, span, SPLIT, C)
    # both: where the loop may take no trip, the compiler serializes the products of its last one
    if (rows.i0 >= rows.n) | (part.t_first >= part.t_stop):
        return
    q, k = Stream(p_q, q_batch, q_token, q_head), Stream(p_k, k_batch, k_token, k_head)
    gate1 = Stream(p_gate1, gate1_batch, gate1_token, gate1_head)
    next_plane = tl.cast(plane, tl.int64) * (C.BM * C.BN)
    routing = routing_of(p_scale1, p_up1, p_z1, gate1, rows, C, M1)
    if GRADIENT:
        o_row, inside = row_offsets(rows, C.BM)
        b_pull = tl.load(p_pull + o_row, mask=inside, other=0.0)
        # the transpose of the second mixing: dz has no gate of its own
        readout = mixing_of(p_scale2, p_down2, p_dz2, gate1, rows.i_h, num_heads, 1.0, rows, C, M2)
    scores = scores_of(queries_of(q, k, rows, ALIGNED, C), rows, part.t_first, C, TURN, C.CHAINED)

    last_columns = no_columns(C)
    if SPLIT and C.BY_LAG:
        # before a row's first tile there is nothing: what is read in its place is hidden later
        _, last_columns = score_columns(scores, last_columns, tl.maximum(part.t_first - 1, 0), rows.n, C, TURN)
    b_dw_gate = tl.zeros((BM, WIDTH), C.ACC)
    b_dw_scale = b_dw_gate
    for t in tl.range(part.t_first, part.t_stop, num_stages=C.STAGES):
        if LARGE and C.ASM:
            # LLVM does not see through it: for every row it would keep an address that grows from trip to trip
            t = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [t], dtype=tl.int32, is_pure=True, pack=1)
        words, last_columns = score_columns(scores, last_columns, t, rows.n, C, TURN)
        x0 = first_column(t, rows, C)
        p_tile = p_planes + tile_offsets(part.tile0 + t - part.t_first, C.BM, C.BN, C.BM)
        b_gate, b_scale = mixed_maps(words, routing, x0, max_lag, C, M1)
        b_da = b_gate
        if GRADIENT:
            # whatever hidden elements of dw hold, it stays theirs
            b_da = mix(tl.load(p_tile).to(C.ACC), readout, x0, max_lag, 1.0, C, M2)
        b_gate, b_scale, b_da = hide_all(b_gate, b_scale, b_da, t, rows, p_valid, C)
        if C.GLU:
            b_softplus = softplus2(b_scale, C.PRECISION == "ieee", C.ASM) * LN2
            b_sigmoid = sigmoid2(b_scale, C.ASM)
        if GRADIENT:
            b_dgate = tl.where(b_gate > 0, b_da, 0.0)
            if C.GLU:
                b_dscale = (b_dgate * b_gate * b_sigmoid).to(p_planes.dtype.element_ty)
                tl.store(p_tile + next_plane * 3, b_dscale)
                b_dgate = b_dgate * b_softplus
            b_dgate = (b_dgate - b_pull[:, None] * b_gate).to(p_planes.dtype.element_ty)
            tl.store(p_tile + next_plane * 2, b_dgate)
        if ACTIVATED:
            b_a = tl.maximum(b_gate, 0.0, propagate_nan=tl.PropagateNan.ALL)
            if C.GLU:
                b_a = b_a * b_softplus
            tl.store(p_tile + next_plane, b_a.to(p_planes.dtype.element_ty))
        if GRADIENT and M1.R > 0:
            b_up = table_rows(routing.gate.p_table, x0, max_lag, C.NG, C.BN, M1.BR)
            b_dw_gate = tl.dot(b_dgate, b_up, b_dw_gate, input_precision=C.PRECISION, out_dtype=C.ACC)
            if C.GLU:
                b_up = table_rows(routing.scale.p_table, x0, max_lag, C.NG, C.BN, M1.BR)
                b_dw_scale = tl.dot(b_dscale, b_up, b_dw_scale, input_precision=C.PRECISION, out_dtype=C.ACC)

    if GRADIENT and M1.R > 0:
        num_maps = num_heads * 2 if C.GLU else num_heads
        for i_map in tl.static_range(2 if C.GLU else 1):
            b_dw = pick_group(b_dw_gate if i_map == 0 else b_dw_scale, C.BM, C.NG, M1.BR)
            if SPLIT:
                store_part(p_dz1, b_dw, i_map, C.BM, M1.BR)
            else:
                token = first_token(rows)
                store_statistic_gradient(
                    b_dw, p_z1, gate1, p_dz1, p_dgate1, i_map, num_maps, token, rows, GATE_GRADIENT, C.BM, M1
                )
