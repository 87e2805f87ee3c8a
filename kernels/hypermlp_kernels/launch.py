"""Host functions: tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from hypermlp_kernels.arguments import Options, SequenceMix
from hypermlp_kernels.call import (
    Call,
    aligned,
    candidates,
    holes,
    interpreted,
    launch_options,
    mix_constants,
    multiprocessors,
    on_device,
    padded_table,
    precision_of,
    readout_tensors,
    routing_tensors,
    run,
    strides,
    unit_stride,
)
from hypermlp_kernels.launch_norms import extreme_norms
from hypermlp_kernels.plan import Chunk, Tiles, Widths, chunks, modelled_clocks, slot_rows, stores
from hypermlp_kernels.readout import readout_kernel
from hypermlp_kernels.rows import routing_statistic_kernel, selection_statistics_kernel
from hypermlp_kernels.schedule import sequences
from hypermlp_kernels.stored import stored_readout_kernel
from hypermlp_kernels.tiles import Design, Kernel, Tile

__all__ = ["forward", "interpreted", "precision_of"]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routing_mix: SequenceMix,
    readout_mix: SequenceMix,
    options: Options,
    *,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    allow_tf32: bool = False,
    chosen: Mapping[Kernel, Tile] | None = None,
    design: Design | None = None,
    scratch_limit: int = 256 * 2**20,
    autotune: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator and its row statistics, in memory linear in ``T`` and a scratch of bounded size.

    Args:
        q: ``[B, T, S*H, K]``, gate maps first; any strides with a last one of 1 are taken as they are.
        k: like ``q``.
        v: ``[B, T, H, V]``.
        routing_mix: over ``S*H`` heads.
        readout_mix: over ``H`` heads.
        options: the switches; ``max_lag`` is the rows of the tables, and by lag the window, or None without either.
        attention_mask: bool ``[B, T]``; masked tokens hold zeros in ``q, k, v`` and the gates.
        cu_seqlens: bounds of packed sequences, with a batch of 1; tokens outside them are padding.
        allow_tf32: whether float32 may be multiplied as tf32.
        chosen: each kernel's tile, instead of the table's.
        design: "recompute" makes the map again for every block of values, "store" keeps it in a scratch
            (``stored.py``); None takes what ``plan.py`` models as faster.
        scratch_limit: bytes that the scratch may take.
        autotune: time the table's tiles where that has not been done, and keep the fastest (``autotune.py``).

    Returns:
        ``o [B, T, H, V]``, ``z1 [B, T, S*H, R]``, ``rho [B, T, H]`` and ``z2 [B, T, H, R]``, all in
        float32 (float64 for float64): the backward needs ``o`` unrounded.

    Raises:
        ValueError: ``design="store"`` and a block of rows does not fit into ``scratch_limit``.
    """
    q, k, v = (unit_stride(x) for x in (q, k, v))
    batch, length, heads = v.shape[:3]
    q = _marked_queries(q, (routing_mix.core, readout_mix.core), heads)
    kept = None
    if attention_mask is not None or cu_seqlens is not None:
        kept = sequences(attention_mask, cu_seqlens, batch, length, q.device)
    dtype = torch.promote_types(q.dtype, torch.float32)
    # with one sequence a row and no mask the kernels write all of these; else what belongs to no sequence is zero
    new = torch.empty if kept is None else torch.zeros
    o = new(v.shape, dtype=dtype, device=q.device)
    z1 = new((batch, length, q.shape[2], routing_mix.rank), dtype=dtype, device=q.device)
    z2 = new((batch, length, heads, readout_mix.rank), dtype=dtype, device=q.device)
    rho = torch.ones((batch, length, heads), dtype=dtype, device=q.device)
    call = Call(
        q, k, v, routing_mix, readout_mix, z1, rho, z2, options, precision_of(q.dtype, allow_tf32),
        attention_mask, kept, chosen, autotune=autotune,
    )  # fmt: skip
    with on_device(q):
        layout = _layout(call, scratch_limit, design)
        if routing_mix.rank:
            _routing_statistic(call)
        if layout is not None:
            _store_and_read(call._replace(design="store"), o, layout)
        else:
            if options.norm or readout_mix.rank:
                _selection_statistics(call)(None)
            _readout(call, o)
    return o, z1, rho, z2


class _Layout(NamedTuple):
    """Of the stored map: rows of a slot, and the chunks."""

    rows: int
    chunks: list[Chunk]


class _Stored(NamedTuple):
    """One chunk of the stored map, for both kernels."""

    map: Tensor
    blocks: Tensor
    num_blocks: int
    per_block: int
    rows: int
    chunk: Chunk


def _layout(call: Call, limit: int, design: Design | None) -> _Layout | None:
    """How the map is stored, or None if it is not."""
    if design == "recompute":
        return None
    storing = call._replace(design="store")
    statistics, stored_readout = candidates("selection_statistics", storing), candidates("stored_readout", storing)
    rows = slot_rows(statistics, stored_readout)
    length, size = call.sizes[1], call.mix_dtype.itemsize
    columns = min(length, call.max_lag) if call.options.by_lag else length
    grows = call.options.causal and call.sequences is None
    parts = chunks(*call.count_blocks(rows), rows, columns, size, limit, grows=grows)
    if design == "store":
        if not parts:
            raise ValueError(f"scratch_limit={limit} bytes does not hold {rows} rows of {columns}; raise it")
    elif parts:
        rank = max(call.routing.rank, call.readout.rank)
        widths = Widths(call.precision, call.options.glu, call.q.shape[-1], call.v.shape[-1], rank, size)
        preferred = Tiles(statistics[0], candidates("readout", call)[0], stored_readout[0])
        parts = parts if stores(*modelled_clocks(widths, preferred, parts, rows, multiprocessors())) else []
    return _Layout(rows, parts) if parts else None


def _store_and_read(call: Call, o: Tensor, layout: _Layout) -> None:
    """Chunk by chunk, the map into the scratch and out of it again."""
    rows, parts = layout
    blocks, num_blocks, per_block = call.blocks(rows)
    size = max(part.slots * part.pitch for part in parts) * rows
    scratch = torch.empty(size, dtype=call.mix_dtype, device=call.q.device)
    store, read = _selection_statistics(call), _stored_readout(call, o)
    for part in parts:
        stored = _Stored(scratch, blocks, num_blocks, per_block, rows, part)
        store(stored)
        read(stored)


def _routing_statistic(call: Call) -> None:
    down = padded_table(call.routing.down, call.mix_dtype)

    def launch(tile: Tile) -> None:
        blocks, num_blocks, programs = call.blocks(tile.rows)
        routing_statistic_kernel[(num_blocks * programs,)](
            call.q, call.k, down, call.z1, blocks,
            *strides(call.q, call.k), call.sizes[1], call.max_lag, num_blocks, call.sizes[2],
            # masked keys are zero, and so add nothing
            ALIGNED=aligned(call.q, call.k), C=call.constants(tile)._replace(HOLES=False),
            M=mix_constants(call.routing), **launch_options(tile),
        )  # fmt: skip

    run("routing_statistic", call, launch)


def _selection_statistics(call: Call) -> Callable[[_Stored | None], None]:
    routing, valid = routing_tensors(call), holes(call)
    down = padded_table(call.readout.down, call.mix_dtype, call.q)

    def launch(tile: Tile, stored: _Stored | None) -> None:
        if stored is None:
            blocks, num_blocks, per_block = call.blocks(tile.rows)
            programs, chunk, rows, kept = num_blocks * per_block, Chunk(0, 0, 0), 0, call.q
        else:
            kept, blocks, num_blocks, per_block, rows, chunk = stored
            programs = chunk.slots * (rows // tile.rows)
        selection_statistics_kernel[(programs,)](
            call.q, call.k, *routing, down, call.rho, call.z2, kept, blocks, valid,
            *strides(call.q, call.k, routing.gate),
            call.sizes[1], call.max_lag, num_blocks, call.sizes[2], per_block, chunk.first, chunk.pitch,
            call.options.eps,
            SLOT=rows, ALIGNED=aligned(call.q, call.k),
            C=call.constants(tile), M1=mix_constants(call.routing), M2=mix_constants(call.readout),
            **launch_options(tile),
        )  # fmt: skip

    extreme = extreme_norms(call, routing)

    def both(stored: _Stored | None) -> None:
        run("selection_statistics", call, lambda tile: launch(tile, stored))
        if call.options.norm:
            extreme()

    return both


def _stored_readout(call: Call, o: Tensor) -> Callable[[_Stored], None]:
    readout, width = readout_tensors(call), o.shape[-1]
    valid, count = holes(call), _count_nonfinite(call)

    def launch(tile: Tile, stored: _Stored) -> None:
        value_blocks, chunk = triton.cdiv(width, tile.values), stored.chunk
        stored_readout_kernel[(chunk.slots * (stored.rows // tile.rows) * value_blocks,)](
            stored.map, call.v, *readout, call.rho, count, o, stored.blocks, valid,
            *strides(call.v, readout.gate),
            call.sizes[1], call.max_lag, stored.num_blocks, call.sizes[2], stored.per_block,
            chunk.first, chunk.pitch, value_blocks,
            V=width, BV=tile.values, SLOT=stored.rows, EARLY=_divides_early(call), ALIGNED_VALUES=aligned(call.v),
            C=call.constants(tile), M2=mix_constants(call.readout), **launch_options(tile),
        )  # fmt: skip

    return lambda stored: run("stored_readout", call, lambda tile: launch(tile, stored))


def _readout(call: Call, o: Tensor) -> None:
    routing, readout = routing_tensors(call), readout_tensors(call)
    valid, count = holes(call), _count_nonfinite(call)

    def launch(tile: Tile) -> None:
        blocks, num_blocks, programs = call.blocks(tile.rows)
        readout_kernel[(num_blocks * programs, triton.cdiv(o.shape[-1], tile.values))](
            call.q, call.k, call.v, *routing, *readout, call.rho, count, o, blocks, valid,
            *strides(call.q, call.k, call.v, routing.gate, readout.gate),
            call.sizes[1], call.max_lag, num_blocks, call.sizes[2],
            V=o.shape[-1], BV=tile.values, EARLY=_divides_early(call),
            ALIGNED=aligned(call.q, call.k), ALIGNED_VALUES=aligned(call.v),
            C=call.constants(tile), M1=mix_constants(call.routing), M2=mix_constants(call.readout),
            **launch_options(tile),
        )  # fmt: skip

    run("readout", call, launch)


def _divides_early(call: Call) -> bool:
    """Weights, not outputs, by ``rho``: float16 would overflow."""
    return call.options.norm and call.q.dtype == torch.float16


def _nonfinite(x: Tensor, heads: int) -> Tensor:
    """Which tokens of ``x`` ``[B, T, maps, width]`` hold a NaN or an infinity in a map of each head, ``[B, T, H]``."""
    largest = torch.linalg.vector_norm(x, ord=float("inf"), dim=-1)
    return (~torch.isfinite(largest)).view(*x.shape[:2], -1, heads).any(2)


def _marked_queries(q: Tensor, gates: tuple[Tensor | None, Tensor | None], heads: int) -> Tensor:
    """``q`` with NaN for every token whose query or gates hold a number that is not finite: it reaches the output."""
    bad = _nonfinite(q, heads)
    for gate in gates:
        if gate is not None:
            bad = bad | _nonfinite(gate, heads)
    return q.masked_fill(bad.repeat(1, 1, q.shape[2] // heads)[..., None], float("nan"))


def _count_nonfinite(call: Call) -> Tensor:
    """``[B, T + 1, H]`` int32: how many tokens before each hold a NaN or an infinity in a head's keys or values."""
    batch, length, heads = call.sizes
    count = torch.zeros(batch, length + 1, heads, dtype=torch.int32, device=call.v.device)
    count[:, 1:] = (_nonfinite(call.k, heads) | _nonfinite(call.v, heads)).cumsum(1, dtype=torch.int32)
    return count
