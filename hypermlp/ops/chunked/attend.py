"""The chunked path, forward: nothing of size ``T x T``, time in matrix products.

Row by row of a tile these are the equations of ``docs/mathematics.md``, with ``1 / rho`` applied
last. The statistics ``z1``, ``rho``, ``z2`` are kept for the backward, which recomputes the rest.
Works on any device PyTorch has; meant for CPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hypermlp.ops.arguments import OperatorArgs, Options, Outputs
from hypermlp.ops.chunked.tiling import Mixing, Slab, Tables, Workspaces, slabs
from hypermlp.ops.lag_layout import Layout, ScoreBuffer, Tile
from hypermlp.ops.nonfinite import without_nonfinite
from hypermlp.ops.row_norm import is_extreme, row_norms, row_units
from hypermlp.ops.softplus import softplus_


class Operands:
    """The operator's arguments in the precision of the computation, with the statistics beside them.

    ``marked``, bool ``[B, T, H]``, are the rows that see a number that is not finite; None: the inputs have none.
    They take part with zeros in its place.
    """

    def __init__(self, x: OperatorArgs, statistics: tuple[Tensor, Tensor, Tensor] | None = None) -> None:
        self.dtype = torch.promote_types(x.q.dtype, torch.float32)
        self.args, self.marked = without_nonfinite(x.map_streams(lambda stream: stream.to(self.dtype)))
        self.q, self.k, self.v, self.routing_mix, self.readout_mix, self.tokens, self.options = self.args
        self.num_heads = x.v.shape[2]
        self._every_row_is_written = self.tokens.valid is None and self.tokens.cu_seqlens is None
        self.z1, self.rho, self.z2 = statistics or self._new_statistics()

    def new(self, shape: Sequence[int]) -> Tensor:
        """Memory for ``[B, T, ...]``, zero where no sequence has a token."""
        return self.q.new_empty(shape) if self._every_row_is_written else self.q.new_zeros(shape)

    def _new_statistics(self) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, num_maps = self.q.shape[:3]
        rho = self.q.new_ones(batch, length, self.num_heads)
        z1 = self.new((batch, length, num_maps, self.routing_mix.rank))
        return z1, rho, self.new((batch, length, self.num_heads, self.readout_mix.rank))


class ScoreMap(NamedTuple):
    """What makes one score map of one head: ``q``, ``k`` ``[batch, n, K]`` and the first mixing."""

    q: Tensor
    k: Tensor
    mixing: Mixing


class Head:
    """One head of one slab: views of everything its tiles read and write."""

    def __init__(self, x: Operands, layout: Layout, slab: Slab, routing: Tables, readout: Tables) -> None:
        self.layout, self.valid = layout, slab.valid(x.tokens.valid, x.dtype)
        self.v, self.rho = slab.keys(x.v, slab.head), slab.queries(x.rho, slab.head)
        self.maps = [
            ScoreMap(
                slab.queries(x.q, index),
                slab.keys(x.k, index),
                Mixing.of(layout, slab, index, routing, x.routing_mix.core, x.z1),
            )
            for index in range(slab.head, x.q.shape[2], x.num_heads)
        ]
        self.readout = Mixing.of(layout, slab, slab.head, readout, x.readout_mix.core, x.z2)

    def score(self, score_map: ScoreMap, tile: Tile, out: ScoreBuffer) -> Tensor:
        """Scores of a tile's queries against the keys they see; returned by column."""
        torch.bmm(score_map.q[:, tile.own], score_map.k[:, tile.keys].mT, out=out.by_key(tile))
        out.hide(tile)
        return out.by_column(tile)


def forward(args: OperatorArgs) -> Outputs:
    """The operator of what :func:`hypermlp.ops.hyper_attention` has checked; padded keys and values are zeros.

    ``q`` and the cores may have fewer rows than ``k`` and ``v``: they are then the last tokens' (the mask counts
    every token).
    """
    x = Operands(args)
    o = x.new((*x.q.shape[:2], *x.v.shape[2:]))
    _forward_rows(x, o, any_size=False)
    if x.options.norm:
        extreme = is_extreme(x.rho)
        if x.tokens.valid is not None:
            extreme &= x.tokens.valid[:, args.past :, None]
        if bool(extreme.any()):
            _forward_rows(x, o, any_size=True)
    o /= (x.rho / row_units(x.rho)).unsqueeze(-1)
    if x.marked is not None:
        o.masked_fill_(x.marked.unsqueeze(-1), float("nan"))
    return Outputs(o, x.z1, x.rho, x.z2)


def _forward_rows(x: Operands, o: Tensor, any_size: bool) -> None:
    """Statistics and ``o`` before the norm; rows of ``any_size`` in units of their own (``row_norm.py``)."""
    works = Workspaces(x.q, num_buffers=x.options.num_maps)
    for layout, parts in slabs(x.args):
        routing = Tables.arrange(x.routing_mix, layout, x.dtype)
        readout = Tables.arrange(x.readout_mix, layout, x.dtype)
        for slab in parts:
            head = Head(x, layout, slab, routing, readout)
            for tile, buffers in works.tiles(layout, slab):
                _forward_tile(head, tile, buffers, x.options, slab.queries(o, slab.head), any_size)


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
