"""The backward with one tile: scratch for chunks of rows, gradients, and the launches in their order."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from hypermlp_kernels.arguments import Gradients, MixGradients, MixNeeds, Needs, SequenceMix
from hypermlp_kernels.backward_keys import key_product_kernel, turn_kernel
from hypermlp_kernels.backward_maps import map_gradient_kernel
from hypermlp_kernels.backward_parts import add_parts_kernel
from hypermlp_kernels.backward_plan import Chunk, Plan, Sizes, Split
from hypermlp_kernels.backward_rows import readout_statistic_gradient_kernel, weight_gradient_kernel
from hypermlp_kernels.backward_tables import table_gradient_kernel
from hypermlp_kernels.backward_tiles import BackwardTile
from hypermlp_kernels.call import (
    FUSION,
    Call,
    aligned,
    gate_of,
    holes,
    launch_options,
    mix_constants,
    padded_table,
    routing_tensors,
    scale_table,
    strides,
)
from hypermlp_kernels.constants import MixConstants
from hypermlp_kernels.tiles import pad_width

# of add_parts_kernel: few rows to a program, so that there are many of them
ADDING = {"ROWS": 16, "num_warps": 4, **FUSION}


class TableGradients:
    """Gradients of a mixing's tables: ``[batches, maps, rows(, BR)]``, where ``rows`` are those in use."""

    def __init__(self, call: Call, mix: SequenceMix, needs: MixNeeds, maps: int, batches: int, rows: int) -> None:
        self.mix, self.needs, self.maps, self.rows = mix, needs, maps, rows
        low_rank = (batches, maps, rows, pad_width(mix.rank))

        def zeros(shape: tuple[int, ...], needed: bool) -> Tensor:
            # any tensor in place of one that is not needed
            return torch.zeros(shape, dtype=call.accumulator, device=call.q.device) if needed else call.rho

        self.diag = zeros(low_rank[:3], needs.diag)
        self.down, self.up = (zeros(low_rank, needed) for needed in (needs.down, needs.up))

    def finished(self, gate: Tensor) -> MixGradients:
        """Summed over the batches, with zeros for rows not in use; ``gate`` is its gradient, or any tensor."""
        mix, needs = self.mix, self.needs
        return MixGradients(
            self._finished(mix.diag, self.diag, needs.diag),
            self._finished(mix.down, self.down, needs.down),
            self._finished(mix.up, self.up, needs.up),
            gate if needs.core else None,
        )

    def _finished(self, table: Tensor | None, grad: Tensor, need: bool) -> Tensor | None:
        if not need or table is None:
            return None
        grad = grad.sum(0)
        if table.ndim == 3:
            grad = grad[..., : table.shape[2]]
        padding = (0, 0) * (table.ndim - 2) + (0, table.shape[1] - self.rows)
        return torch.nn.functional.pad(grad, padding).contiguous()


class BackwardPass:
    """One backward with one tile: its buffers and its launches."""

    def __init__(
        self, call: Call, needs: Needs, tile: BackwardTile, grad_o: Tensor, o: Tensor, limit: int, span: int | None
    ) -> None:
        self._call, self._needs, self._tile = call, needs, tile
        self._constants = call.constants(tile)
        # of kernels that meet no masked key, or zeros in its place
        self._unmasked = self._constants._replace(HOLES=False)
        self._do = grad_o.to(call.q.dtype).contiguous()
        self._pull = self._pull_of_norm(grad_o, o)
        self._blocks, num_blocks, programs = call.blocks(tile.rows)
        self._plan = Plan.of(call, tile, num_blocks, programs)
        self._valid = holes(call)

        dtype = call.mix_dtype
        sizes = Sizes(
            self._num_planes * tile.rows * tile.keys * dtype.itemsize,
            tile.rows * self._part_width() * call.accumulator.itemsize,
        )
        self._chunks = list(self._plan.chunks(limit, sizes, Split.of(tile, span)))
        largest = max(sizes.of(chunk) for chunk in self._chunks)
        self._scratch = torch.empty(largest // dtype.itemsize, dtype=dtype, device=call.q.device)

        batch, length = call.sizes[:2]
        self._dq = self._rows(call.q.shape, needs.q)
        self._dk = self._rows(call.k.shape, needs.k, zero=True)
        self._dv = self._rows(call.v.shape, needs.v, zero=True)
        self._dz1 = self._rows(call.z1.shape, needs.scores)
        self._dgate1 = self._rows(call.z1.shape, needs.routing.core)
        self._dz2 = self._rows(call.z2.shape, needs.readout_statistic)
        self._dgate2 = self._rows(call.z2.shape, needs.readout.core)
        batches = batch if call.sequences is None else 1
        rows = min(call.max_lag, length)
        self._routing = TableGradients(call, call.routing, needs.routing, call.q.shape[2], batches, rows)
        self._readout = TableGradients(call, call.readout, needs.readout, call.sizes[2], batches, rows)

    def run(self) -> Gradients:
        needs = self._needs
        for chunk in self._chunks:
            self._lay_out(chunk)
            if needs.weights:
                self._weight_gradient(chunk)
            if needs.readout_statistic and self._call.readout.rank:
                self._readout_statistic_gradient(chunk)
            if needs.scores or needs.activated:
                self._map_gradient(chunk)
            if needs.readout.tables:
                self._table_gradient(chunk, self._readout, scores=False)
            if needs.routing.tables:
                self._table_gradient(chunk, self._routing, scores=True)
            if needs.v:
                self._turn_weights(chunk)
                self._key_product(chunk, self._do, self._dv, maps=1, block=self._tile.values)
            if needs.q or needs.k:
                self._turn_score_gradients(chunk)
            if needs.k:
                self._key_product(chunk, self._call.q, self._dk, self._num_maps, pad_width(self._call.q.shape[-1]))
        return Gradients(
            self._dq if needs.q else None,
            self._dk if needs.k else None,
            self._dv if needs.v else None,
            self._routing.finished(self._dgate1),
            self._readout.finished(self._dgate2),
        )

    @property
    def _num_maps(self) -> int:
        """Score maps of a head."""
        return 2 if self._call.options.glu else 1

    @property
    def _num_planes(self) -> int:
        """Planes of ``dw`` and ``a``, which later take the maps by key, then of ``dy``."""
        return 2 + (self._num_maps if self._needs.scores else 0)

    def _lay_out(self, chunk: Chunk) -> None:
        """The planes of a chunk, and behind them its parts of sums."""
        elements = self._num_planes * chunk.tiles * self._tile.rows * self._tile.keys
        self._planes = self._scratch[:elements].view(self._num_planes, -1)
        self._parts = self._scratch[elements:].view(self._call.accumulator)

    def _part_width(self) -> int:
        """What a row leaves of a part in the scratch: the widest of the sums, which follow one another there."""
        call, needs = self._call, self._needs
        of_scores = pad_width(call.routing.rank) * needs.scores, pad_width(call.q.shape[-1]) * needs.q
        return max(pad_width(call.readout.rank) * needs.readout_statistic, *(self._num_maps * x for x in of_scores))

    def _pull_of_norm(self, grad_o: Tensor, o: Tensor) -> Tensor:
        """What flows back through ``rho``, ``[B, T, H]``: ``dg`` gets this times ``-g``; ``o`` is 0 if none does."""
        call = self._call
        if not (call.options.norm and self._needs.scores):
            return torch.zeros_like(call.rho)
        return (grad_o * o).sum(-1) / call.rho / call.rho

    def _rows(self, shape: torch.Size, needed: bool, zero: bool = False) -> Tensor:
        """Memory for ``[B, T, ...]``, zero where no program writes; any tensor if it is not needed."""
        if not needed:
            return self._pull
        new = torch.zeros if zero or self._call.sequences is not None else torch.empty
        return new(shape, dtype=self._call.accumulator, device=self._call.q.device)

    def _rows_of(self, chunk: Chunk, *num_maps: int) -> tuple[int, ...]:
        """What the kernels that own rows are told about a chunk, and how many maps there are if they ask."""
        call, plan = self._call, self._plan
        return (
            call.sizes[1], call.max_lag, plan.heads, call.sizes[2], *num_maps,
            chunk.stop - 1, chunk.origin, plan.full, plan.most,
        )  # fmt: skip

    def _sums(self, chunk: Chunk, of_rows: Tensor) -> Tensor:
        """Where a kernel puts its sums over rows: the tensor for them, or their parts in the scratch."""
        return of_rows if chunk.parts == 1 else self._parts

    def _add_parts(
        self, chunk: Chunk, into: Tensor, dgate: Tensor, z: Tensor, gate: Tensor, mix: MixConstants, gate_gradient: bool
    ) -> None:
        """Makes the sums over rows ``[B, T, maps, R]`` of those that were split."""
        if chunk.parts == 1:
            return
        num_maps, width = into.shape[2:]
        block = pad_width(width)
        # up to 32 KB on their way hide the latency of memory
        stages = max(1, min(512 // block, 8))
        add_parts_kernel[(chunk.blocks, num_maps // self._call.sizes[2], self._tile.rows // ADDING["ROWS"])](
            self._parts, z, gate, into, dgate, self._blocks,
            *strides(gate), *self._rows_of(chunk, num_maps), chunk.span, chunk.parts,
            GATE_GRADIENT=gate_gradient, C=self._unmasked._replace(STAGES=stages), M=mix._replace(R=width, BR=block),
            num_stages=stages, **ADDING,
        )  # fmt: skip

    def _weight_gradient(self, chunk: Chunk) -> None:
        call, tile = self._call, self._tile
        grid = (chunk.blocks, triton.cdiv(self._plan.most * tile.keys, tile.columns))
        weight_gradient_kernel[grid](
            self._do, call.v, call.rho, self._planes, self._blocks,
            *strides(call.v), *self._rows_of(chunk), triton.cdiv(call.v.shape[-1], tile.depth),
            V=call.v.shape[-1], BJ=tile.columns, BV=tile.depth, ALIGNED=aligned(call.v), C=self._unmasked,
            **launch_options(tile),
        )  # fmt: skip

    def _readout_statistic_gradient(self, chunk: Chunk) -> None:
        call, mix = self._call, self._call.readout
        up, gate = padded_table(mix.up, call.mix_dtype), gate_of(mix, call.q)
        constants, gate_gradient = mix_constants(mix), self._needs.readout.core
        readout_statistic_gradient_kernel[(chunk.blocks, chunk.parts)](
            self._planes, up, gate, call.z2, self._sums(chunk, self._dz2), self._dgate2, self._blocks, self._valid,
            *strides(gate), *self._rows_of(chunk), chunk.span,
            GATE_GRADIENT=gate_gradient, SPLIT=chunk.parts > 1, C=self._constants, M=constants,
            **launch_options(self._tile),
        )  # fmt: skip
        self._add_parts(chunk, self._dz2, self._dgate2, call.z2, gate, constants, gate_gradient)

    def _map_gradient(self, chunk: Chunk) -> None:
        call, needs, readout = self._call, self._needs, self._call.readout
        routing, constants = routing_tensors(call), mix_constants(call.routing)
        scale, down = scale_table(readout, 1.0, call), padded_table(readout.down, call.mix_dtype, call.q)
        map_gradient_kernel[(chunk.blocks, chunk.parts)](
            call.q, call.k, *routing, scale, down, self._dz2, self._pull,
            self._planes, self._sums(chunk, self._dz1), self._dgate1, self._blocks, self._valid,
            *strides(call.q, call.k, routing.gate), *self._rows_of(chunk), chunk.tiles, chunk.span,
            GRADIENT=needs.scores, GATE_GRADIENT=needs.routing.core, ACTIVATED=needs.activated, SPLIT=chunk.parts > 1,
            ALIGNED=aligned(call.q, call.k), C=self._constants, M1=constants, M2=mix_constants(readout, gated=False),
            **launch_options(self._tile),
        )  # fmt: skip
        if needs.scores and call.routing.rank:
            self._add_parts(chunk, self._dz1, self._dgate1, call.z1, routing.gate, constants, needs.routing.core)

    def _table_gradient(self, chunk: Chunk, into: TableGradients, scores: bool) -> None:
        call, plan, mix = self._call, self._plan, into.mix
        gate = gate_of(mix, call.q)
        z, dz = (call.z1, self._dz1) if scores else (call.z2, self._dz2)
        grid = (triton.cdiv(into.rows, self._tile.keys) * plan.heads, into.maps // call.sizes[2])
        # dy of the scores is zero where hidden already
        block = self._unmasked if scores else self._constants
        # by lag a program has ``keys`` rows of a tile at once, by position all
        unit = block._replace(BM=block.BN, NG=1) if call.options.by_lag else block
        table_gradient_kernel[grid](
            call.q, call.k, self._planes[1], self._planes[2 if scores else 0], z, gate, dz,
            into.diag, into.down, into.up, self._blocks, self._valid,
            *strides(call.q, call.k, gate),
            call.sizes[1], call.max_lag, into.rows, plan.heads, call.sizes[2], into.maps,
            chunk.first, chunk.stop, chunk.origin, plan.full, plan.most, chunk.tiles,
            SCORES=scores, NEEDS=into.needs._replace(core=False), ALIGNED=aligned(call.q, call.k),
            ALIGNED_GATE=aligned(gate), BLOCK=block, UNIT=unit, M=mix_constants(mix),
            num_stages=self._tile.stages, num_warps=max(1, self._tile.warps * unit.BM // block.BM), **FUSION,
        )  # fmt: skip

    def _turn_weights(self, chunk: Chunk) -> None:
        self._turn(chunk, self._call.readout, self._call.readout.up, 1, weights=True)

    def _turn_score_gradients(self, chunk: Chunk) -> None:
        self._turn(chunk, self._call.routing, self._call.routing.down, 2, weights=False)
        if self._needs.q:
            ungated = mix_constants(self._call.routing, gated=False)
            self._add_parts(chunk, self._dq, self._dq, self._dq, self._call.q, ungated, gate_gradient=False)

    def _turn(self, chunk: Chunk, mix: SequenceMix, table: Tensor | None, plane: int, weights: bool) -> None:
        """From ``plane`` and those after it to the planes from 0 on, which nothing needs any longer."""
        call = self._call
        table, gate = padded_table(table, call.mix_dtype, call.q), gate_of(mix, call.q)
        num_maps = call.sizes[2] if weights else call.q.shape[2]
        turn_kernel[(chunk.blocks, chunk.parts, num_maps // call.sizes[2])](
            self._planes[plane], scale_table(mix, 1.0, call), table, call.z2 if weights else self._dz1, gate, call.rho,
            call.k, self._planes, self._sums(chunk, self._dq), self._blocks, self._valid,
            *strides(call.k, gate), *self._rows_of(chunk, num_maps), chunk.tiles, chunk.span,
            WEIGHTS=weights, QUERY_GRADIENT=self._needs.q and not weights, SPLIT=chunk.parts > 1,
            ALIGNED=aligned(call.k), C=self._constants, M=mix_constants(mix, gated=weights),
            **launch_options(self._tile),
        )  # fmt: skip

    def _key_product(self, chunk: Chunk, y: Tensor, into: Tensor, maps: int, block: int) -> None:
        call, plan = self._call, self._plan
        key_product_kernel[(plan.num_blocks * plan.heads * triton.cdiv(y.shape[-1], block), maps)](
            self._planes, y, into, self._blocks,
            *strides(y), call.sizes[1], call.max_lag, plan.heads, call.sizes[2], y.shape[2],
            chunk.first, chunk.stop, chunk.origin, plan.full, plan.most, chunk.tiles,
            WIDTH=y.shape[-1], BW=block, ALIGNED=aligned(y), C=self._unmasked, **launch_options(self._tile),
        )  # fmt: skip
