"""The chunked path, forward: nothing of size ``T x T``, time in matrix products.

Row by row of a tile these are the equations of ``docs/mathematics.md``, with ``1 / rho`` applied
last. The statistics ``z1``, ``rho``, ``z2`` are kept for the backward, which recomputes the rest.
Works on any device PyTorch has; meant for CPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from hypermlp.ops.lag_layout import Layout, ScoreBuffer, Tile
from hypermlp.ops.mixing import SequenceMix
from hypermlp.ops.nonfinite import without_nonfinite
from hypermlp.ops.row_norm import is_extreme, row_norms, row_units
from hypermlp.ops.softplus import softplus_
from hypermlp.ops.tiling import Mixing, Options, Slab, Tables, Workspaces, slabs


class Operands:
    """The operator's inputs in the precision of the computation, with the statistics beside them.

    ``z1`` is ``[B, T, S*H, R]`` and ``z2`` ``[B, T, H, R]`` (width 0 without low-rank term),
    ``rho`` ``[B, T, H]``. ``marked``, bool ``[B, T, H]``, are the rows that see a number that is not finite; None: the
    inputs have none. They take part with zeros in its place.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        routing_mix: SequenceMix,
        readout_mix: SequenceMix,
        options: Options,
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        statistics: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> None:
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.num_heads = v.shape[2]
        self.past = k.shape[1] - q.shape[1]
        routing_mix, readout_mix = (
            mix if mix.gate is None else mix._replace(gate=mix.gate.to(self.dtype))
            for mix in (routing_mix, readout_mix)
        )
        self.q, self.k, self.v, self.routing_mix, self.readout_mix, self.marked = without_nonfinite(
            q.to(self.dtype), k.to(self.dtype), v.to(self.dtype), routing_mix, readout_mix,
            partial(options.key_spans, k.shape[1], cu_seqlens, k.device),
        )  # fmt: skip
        self._every_row_is_written = attention_mask is None and cu_seqlens is None
        self.z1, self.rho, self.z2 = statistics or self._new_statistics()

    def new(self, shape: Sequence[int]) -> Tensor:
        """Memory for ``[B, T, ...]``, zero where no sequence has a token."""
        return self.q.new_empty(shape) if self._every_row_is_written else self.q.new_zeros(shape)

    def _new_statistics(self) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, num_maps = self.q.shape[:3]
        rank1, rank2 = (0 if mix.down is None else mix.down.shape[-1] for mix in (self.routing_mix, self.readout_mix))
        rho = self.q.new_ones(batch, length, self.num_heads)
        return self.new((batch, length, num_maps, rank1)), rho, self.new((batch, length, self.num_heads, rank2))


class ScoreMap(NamedTuple):
    """What makes one score map of one head: ``q``, ``k`` ``[batch, n, K]`` and the first mixing."""

    q: Tensor
    k: Tensor
    mixing: Mixing


class Head:
    """One head of one slab: views of everything its tiles read and write."""

    def __init__(
        self, x: Operands, layout: Layout, slab: Slab, routing: Tables, readout: Tables, valid: Tensor | None
    ) -> None:
        self.layout, self.valid = layout, valid
        self.v, self.rho = slab.keys(x.v, slab.head), slab.queries(x.rho, slab.head)
        self.maps = [
            ScoreMap(
                slab.queries(x.q, index),
                slab.keys(x.k, index),
                Mixing.of(layout, slab, index, routing, x.routing_mix.gate, x.z1),
            )
            for index in range(slab.head, x.q.shape[2], x.num_heads)
        ]
        self.readout = Mixing.of(layout, slab, slab.head, readout, x.readout_mix.gate, x.z2)

    def score(self, score_map: ScoreMap, tile: Tile, out: ScoreBuffer) -> Tensor:
        """Scores of a tile's queries against the keys they see; returned by column."""
        torch.bmm(score_map.q[:, tile.own], score_map.k[:, tile.keys].mT, out=out.by_key(tile))
        out.hide(tile)
        return out.by_column(tile)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routing_mix: SequenceMix,
    readout_mix: SequenceMix,
    options: Options,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(o, z1, rho, z2)`` of the operator, all in float32 or better.

    The backward takes ``rho``'s gradient from ``o``, and divides by ``rho``: rounded to the input's
    precision, ``o`` would drown it.

    Takes what :func:`hypermlp.ops.hyper_attention` has checked; padded tokens hold zeros. ``q``
    and the gates may have fewer rows than ``k`` and ``v``: they are then the last tokens' (the
    mask counts every token).
    """
    x = Operands(q, k, v, routing_mix, readout_mix, options, attention_mask, cu_seqlens)
    o = x.new((*q.shape[:2], *v.shape[2:]))
    _forward_rows(x, o, options, attention_mask, cu_seqlens, any_size=False)
    if options.norm:
        extreme = is_extreme(x.rho)
        if attention_mask is not None:
            extreme &= attention_mask[:, x.past :, None]
        if bool(extreme.any()):
            _forward_rows(x, o, options, attention_mask, cu_seqlens, any_size=True)
    o /= (x.rho / row_units(x.rho)).unsqueeze(-1)
    if x.marked is not None:
        o.masked_fill_(x.marked.unsqueeze(-1), float("nan"))
    return o, x.z1, x.rho, x.z2


def _forward_rows(
    x: Operands,
    o: Tensor,
    options: Options,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    any_size: bool,
) -> None:
    """Statistics and ``o`` before the norm; rows of ``any_size`` in units of their own (``row_norm.py``)."""
    works = Workspaces(x.q, num_buffers=options.num_maps)
    for layout, parts in slabs(x.v, x.past, options, attention_mask, cu_seqlens):
        routing = Tables.arrange(x.routing_mix, layout, x.dtype)
        readout = Tables.arrange(x.readout_mix, layout, x.dtype)
        for slab in parts:
            head = Head(x, layout, slab, routing, readout, slab.valid(attention_mask, x.dtype))
            for tile, buffers in works.tiles(layout, slab):
                _forward_tile(head, tile, buffers, options, slab.queries(o, slab.head), any_size)


def _forward_tile(
    head: Head, tile: Tile, buffers: list[ScoreBuffer], options: Options, o: Tensor, any_size: bool
) -> None:
    """Scores, first mixing, selection, second mixing and readout, each in place of the last."""
    for score_map, buffer in zip(head.maps, buffers, strict=True):
        s = head.score(score_map, tile, buffer)
        score_map.mixing.apply(s, tile, out=s, saved=False)
        buffer.hide(tile, head.valid)
    gate, *scale = (buffer.by_column(tile) for buffer in buffers)
    if options.norm:
        if any_size:
            norm = row_norms(gate, options.eps)
            gate.div_(row_units(norm).unsqueeze(-1))
        else:
            norm = torch.linalg.vector_norm(gate, dim=-1).clamp_min_(options.eps)
        head.rho[:, tile.own] = norm.view(-1, tile.rows)
    a = gate.relu_()
    if scale:
        a.mul_(softplus_(scale[0]))
    head.readout.apply(a, tile, out=a, saved=False)
    buffers[0].hide(tile)
    torch.bmm(buffers[0].by_key(tile), head.v[:, tile.keys], out=o[:, tile.own])
