"""The chunked path, backward: each tile's maps are made again from the saved statistics.

``docs/mathematics.md`` derives the gradients. A gradient that was not asked for is not computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hypermlp.ops.arguments import Gradients, MixGradients, MixNeeds, Needs, OperatorArgs, Outputs, SequenceMix
from hypermlp.ops.chunked.attend import Head, Operands
from hypermlp.ops.chunked.tiling import Mixing, Slab, Tables, Workspaces, slabs
from hypermlp.ops.lag_layout import Layout, ScoreBuffer, Tile
from hypermlp.ops.row_norm import row_units
from hypermlp.ops.softplus import softplus_


class MixGrads:
    """Gradients of one sequence mixing, as they are summed up."""

    def __init__(self, mix: SequenceMix, needs: MixNeeds, x: Operands) -> None:
        def zeros(table: Tensor | None, need: bool) -> Tensor | None:
            if table is None or not need:
                return None
            return torch.zeros(table.shape, dtype=x.dtype, device=table.device)

        self.diag, self.down = zeros(mix.diag, needs.diag), zeros(mix.down, needs.down)
        self.up = zeros(mix.up, needs.up)
        self.core = x.new(mix.core.shape) if mix.core is not None and needs.core else None

    def accumulators(self, layout: Layout) -> Tables:
        """Zeros in column order, for one segment."""

        def zeros(table: Tensor) -> Tensor:
            heads, _, *rank = table.shape
            # columns lie side by side in memory: sums into a wide matrix are faster than into a tall one
            return table.new_zeros(heads, *rank, layout.columns).movedim(-1, 1)

        return Tables(self.diag, self.down, self.up, identity=False).map(zeros)

    def add(self, accumulated: Tables, layout: Layout) -> None:
        pairs = ((self.diag, accumulated.scale), (self.down, accumulated.down), (self.up, accumulated.up))
        for total, part in pairs:
            if total is not None and part is not None:
                total += layout.restore(part, total.shape[1])

    def finished(self) -> MixGradients:
        return MixGradients(self.diag, self.down, self.up, self.core)


class HeadGrads(NamedTuple):
    """One head of one slab: where its tiles add their gradients."""

    q: list[Tensor | None]
    k: list[Tensor | None]
    v: Tensor | None
    routing: list[tuple[Tables, Tensor | None]]
    readout: tuple[Tables, Tensor | None]
    reaches_readout: bool
    reaches_scores: bool


class Grads:
    """Everything the backward makes, whole tensors."""

    def __init__(self, x: Operands, needs: Needs) -> None:
        self.q = x.new(x.q.shape) if needs.q else None
        self.k = torch.zeros_like(x.k, memory_format=torch.contiguous_format) if needs.k else None
        self.v = torch.zeros_like(x.v, memory_format=torch.contiguous_format) if needs.v else None
        self.routing = MixGrads(x.routing_mix, needs.routing, x)
        self.readout = MixGrads(x.readout_mix, needs.readout, x)
        self._needs = needs

    def head(self, x: Operands, slab: Slab, routing: Tables, readout: Tables) -> HeadGrads:
        def part(grad: Tensor | None, view: Callable[[Tensor, int], Tensor], index: int) -> Tensor | None:
            return None if grad is None else view(grad, index)

        def mixing(tables: Tables, core: Tensor | None, index: int) -> tuple[Tables, Tensor | None]:
            return tables.map(lambda table: table[index]), part(core, slab.queries, index)

        maps = range(slab.head, x.q.shape[2], x.num_heads)
        return HeadGrads(
            [part(self.q, slab.queries, index) for index in maps],
            [part(self.k, slab.keys, index) for index in maps],
            part(self.v, slab.keys, slab.head),
            [mixing(routing, self.routing.core, index) for index in maps],
            mixing(readout, self.readout.core, slab.head),
            reaches_readout=self._needs.weights,
            reaches_scores=self._needs.scores,
        )


def backward(grad_o: Tensor, outputs: Outputs, args: OperatorArgs, needs: Needs) -> Gradients:
    """Gradients of the operator.

    Args:
        grad_o: ``[B, T, H, V]``, or of the last tokens, as ``q`` is.
        outputs: the forward's.
        args: its arguments.
        needs: the gradients asked for; the others are None.
    """
    o = outputs.o
    x = Operands(args, outputs.statistics)
    grads = Grads(x, needs)
    grad_o = grad_o.to(x.dtype)
    if x.marked is not None:
        grad_o, o = (y.masked_fill(x.marked.unsqueeze(-1), 0) for y in (grad_o, o))
    # 1 / rho was applied last: it scales what flows back, and rho's own gradient is a row sum
    unit = row_units(x.rho)
    rho = x.rho / unit
    scaled = grad_o / rho.unsqueeze(-1)
    pull = None
    if x.options.norm:
        pull = torch.where(x.rho > x.options.eps, (scaled * o).sum(-1) / rho, 0)
    units = unit if bool((unit != 1).any()) else None
    works = Workspaces(x.q, num_buffers=3 * x.options.num_maps + 1)
    for layout, parts in slabs(x.args):
        routing = Tables.arrange(x.routing_mix, layout, x.dtype)
        readout = Tables.arrange(x.readout_mix, layout, x.dtype)
        into_routing, into_readout = grads.routing.accumulators(layout), grads.readout.accumulators(layout)
        for slab in parts:
            head = Head(x, layout, slab, routing, readout)
            into = grads.head(x, slab, into_routing, into_readout)
            of_rows = [None if y is None else slab.queries(y, slab.head) for y in (pull, units)]
            for tile, buffers in works.tiles(layout, slab):
                _backward_tile(head, into, tile, buffers, slab.queries(scaled, slab.head), *of_rows)
        grads.routing.add(into_routing, layout)
        grads.readout.add(into_readout, layout)
    return Gradients(grads.q, grads.k, grads.v, grads.routing.finished(), grads.readout.finished())


def _backward_tile(
    head: Head,
    into: HeadGrads,
    tile: Tile,
    buffers: list[ScoreBuffer],
    grad_o: Tensor,
    pull: Tensor | None,
    units: Tensor | None,
) -> None:
    """One tile's part of every gradient. A map is overwritten by its gradient once it is used up.

    ``pull``, what ``rho`` adds, and the rows' ``units``, None if all are 1, are ``[batch, n]``.
    """
    num_maps = len(head.maps)
    scores, mixed = buffers[:num_maps], buffers[num_maps : 2 * num_maps]
    *scratch, weights = buffers[2 * num_maps :]
    grad_o = grad_o[:, tile.own]

    for score_map, s, y in zip(head.maps, scores, mixed, strict=True):
        score_map.mixing.apply(head.score(score_map, tile, s), tile, out=y.by_column(tile), saved=True)
        y.hide(tile, head.valid)
    gate, *scale = (y.by_column(tile) for y in mixed)
    unit = None if units is None else units[:, tile.own].reshape(-1, 1)
    if unit is not None:
        gate.div_(unit)
    a = torch.clamp_min(gate, 0, out=scratch[0].by_column(tile))
    if scale:
        softplus = softplus_(scratch[1].by_column(tile).copy_(scale[0]))
        a.mul_(softplus)

    if into.v is not None:
        head.readout.apply(a, tile, out=weights.by_column(tile), saved=True)
        weights.hide(tile)
        into.v[:, tile.keys].baddbmm_(weights.by_key(tile).mT, grad_o)
    if not into.reaches_readout:
        return
    torch.bmm(grad_o, head.v[:, tile.keys].mT, out=weights.by_key(tile))
    weights.hide(tile)
    da = _mix_backward(head.readout, tile, a, weights.by_column(tile), *into.readout)
    if not into.reaches_scores:
        return

    grad_maps = [weights]
    if scale:
        # u: da relu(g) sigmoid(u)
        du = torch.clamp_min(gate, 0, out=a).mul_(da)
        scale[0].sigmoid_().mul_(du)
        da.mul_(softplus)
        grad_maps.append(mixed[1])
    # g: da softplus(u) where g > 0, and the pull of rho
    torch.ops.aten.threshold_backward.grad_input(da, gate, 0, grad_input=da)
    if pull is not None:
        da.addcmul_(gate, pull[:, tile.own].reshape(-1, 1), value=-1)
    if unit is not None:
        da.div_(unit)
    for index, (score_map, s, dy) in enumerate(zip(head.maps, scores, grad_maps, strict=True)):
        _mix_backward(score_map.mixing, tile, s.by_column(tile), dy.by_column(tile), *into.routing[index])
        dy.hide(tile)
        ds, dq, dk = dy.by_key(tile), into.q[index], into.k[index]
        if dq is not None:
            torch.bmm(ds, score_map.k[:, tile.keys], out=dq[:, tile.own])
        if dk is not None:
            dk[:, tile.keys].baddbmm_(ds.mT, score_map.q[:, tile.own])


def _mix_backward(
    mixing: Mixing, tile: Tile, x: Tensor, dy: Tensor, into_tables: Tables, into_core: Tensor | None
) -> Tensor:
    """Gradients of ``y = x * scale + (core * z) up^T``, ``z = x down``, all ``[batch * rows, columns]``.

    Uses up both maps: the gradient of ``x`` takes the place of ``dy``, and ``x`` is scratch.
    """
    tables, into = mixing.beside(tile), into_tables.map(lambda table: mixing.layout.beside(table, tile))
    dz = None
    if tables.up is not None:
        z = mixing.z[:, tile.own]
        dw = (dy @ tables.up).view_as(z)
        dz = mixing.times_core(dw, tile)
        if into_core is not None:
            torch.mul(z, dw, out=into_core[:, tile.own])
        if into.up is not None:
            into.up.addmm_(dy.mT, mixing.times_core(z, tile))
        if into.down is not None:
            into.down.addmm_(x.mT, dz)
    if into.scale is not None:
        into.scale.add_(x.mul_(dy).sum(0))
    if tables.scale is not None:
        dy.mul_(tables.scale)
    elif not tables.identity:
        dy.zero_()
    if dz is not None and tables.down is not None:
        dy.addmm_(dz, tables.down.mT)
    return dy
