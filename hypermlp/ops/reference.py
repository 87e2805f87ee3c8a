"""The reference path: the equations of ``docs/mathematics.md``, line by line.

Dense and slow on purpose: every ``T x T`` map is there to be read. It is differentiable any
number of times, works under every ``torch.func`` transform, and is what every other path is
tested against.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from hypermlp.ops.arguments import OperatorArgs, Options, SequenceMix
from hypermlp.ops.lag_layout import columns_to_keys
from hypermlp.ops.nonfinite import finite, rows_that_see_nonfinite
from hypermlp.ops.softplus import softplus
from hypermlp.ops.varlen import Tokens


def hyper_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routing_mix: SequenceMix,
    readout_mix: SequenceMix,
    *,
    selection: str,
    norm: bool,
    eps: float,
    causal: bool,
    layout: str,
    max_lag: int | None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`forward` of arguments by name, those of :func:`hypermlp.ops.hyper_attention` with their meaning."""
    options, tokens = Options(selection, norm, eps, causal, layout, max_lag), Tokens(attention_mask, cu_seqlens)
    return forward(OperatorArgs(q, k, v, routing_mix, readout_mix, tokens, options), compute_dtype)


def forward(x: OperatorArgs, compute_dtype: torch.dtype | None = None) -> Tensor:
    """``o`` of the operator, ``[B, T, H, V]``, by materialising every map.

    Takes what :func:`hypermlp.ops.hyper_attention` has checked; padded tokens hold zeros. ``q`` and the cores may be of
    the last tokens alone. ``compute_dtype`` is the precision of the computation: by default the input's, and at least
    float32, so that the statistics never lose more.
    """
    out_dtype, length = x.q.dtype, x.k.shape[1]
    dtype = compute_dtype or torch.promote_types(out_dtype, torch.float32)
    span = x.spans()
    marked = rows_that_see_nonfinite(x, *span)
    x = x.map_streams(lambda stream: finite(stream).to(dtype))
    maps = dense_maps(x, span)

    # back from columns to key positions; hidden columns carry zeros
    w = maps.weights
    weights = w.new_zeros(*w.shape[:3], length).scatter_add(-1, maps.keys.expand_as(w), w)
    o = torch.einsum("bhij,bjhv->bihv", weights, x.v)
    if maps.norm is not None:
        o = o / rearrange(maps.norm, "b h i 1 -> b i h 1")
    return torch.where(rearrange(marked, "b i h -> b i h 1"), float("nan"), o).to(out_dtype)


class DenseMaps(NamedTuple):
    """Every map of the operator, row ``i`` of a token's query; column ``c`` is row ``c`` of the tables.

    ``active``, ``weights`` and ``z2`` are to be divided by ``norm``, where there is one: it may be applied last.

    Attributes:
        keys: int64 ``[B or 1, 1, T, n]``, the key that each column stands for.
        visible: bool, likewise: whether that key is there to be seen. All maps are zero elsewhere.
        active: ``a``, ``[B, H, T, n]``.
        weights: ``w``, ``[B, H, T, n]``.
        z1: ``[B, S*H, T, R]``; None without a low-rank term.
        z2: ``[B, H, T, R]``; None likewise.
        norm: ``rho`` in the unit of its row, ``[B, H, T, 1]``; None without a norm.
    """

    keys: Tensor
    visible: Tensor
    active: Tensor
    weights: Tensor
    z1: Tensor | None
    z2: Tensor | None
    norm: Tensor | None


def dense_maps(x: OperatorArgs, span: tuple[Tensor, Tensor]) -> DenseMaps:
    """The maps of finite ``x`` that hold zeros for padded tokens, in the precision of ``x.q``.

    ``span`` is what ``x.spans()`` gives.
    """
    options = x.options
    keys, visible = (y[:, :, x.past :] for y in columns_to_keys(*span, options, x.tokens))
    # s_i[c] = q_i . k_j, where column c of row i stands for key j
    s = torch.einsum("bihk,bjhk->bhij", x.q, x.k)
    s = torch.where(visible, s.gather(-1, keys.expand(*s.shape[:2], -1, -1)), 0)

    y, z1 = _mix(s, x.routing_mix, visible)
    gate_map, *scale_map = y.chunk(options.num_maps, dim=1)
    norm = None
    if options.norm:
        # in units of its largest score: the row's squares neither overflow nor vanish, nor does its product with u;
        # a power of two, which changes no digit
        unit = gate_map.detach().abs().amax(-1, keepdim=True).clamp_min(options.eps).log2().floor().exp2()
        gate_map = gate_map / unit
        norm = _row_norm(gate_map, options.eps / unit)
    a = softplus(scale_map[0]) * F.relu(gate_map) if scale_map else F.relu(gate_map)
    w, z2 = _mix(a, x.readout_mix, visible)
    return DenseMaps(keys, visible, a, w, z1, z2, norm)


def _mix(x: Tensor, mix: SequenceMix, visible: Tensor) -> tuple[Tensor, Tensor | None]:
    """``x (Diag(identity + diag) + down Diag(core) up^T)`` along the last axis of ``[B, heads, T, n]``; and ``z``."""
    n, dtype = x.shape[-1], x.dtype
    z: Tensor | None = None
    y = x if mix.identity else torch.zeros_like(x)
    if mix.diag is not None:
        y = y + x * rearrange(mix.diag[:, :n], "h c -> h 1 c").to(dtype)
    if mix.down is not None and mix.up is not None:
        z = torch.einsum("bhic,hcr->bhir", x, mix.down[:, :n].to(dtype))
        used = z if mix.core is None else z * rearrange(mix.core, "b i h r -> b h i r")
        y = y + torch.einsum("bhir,hcr->bhic", used, mix.up[:, :n].to(dtype))
    return torch.where(visible, y, 0), z


def _row_norm(x: Tensor, eps: Tensor) -> Tensor:
    """``max(||x||_2, eps)`` over the last axis, which stays, with no gradient (of any order) at or below eps."""
    square = x.square().sum(-1, keepdim=True)
    above = square.sqrt().detach() > eps
    return torch.where(above, torch.where(above, square, 1).sqrt(), eps)
