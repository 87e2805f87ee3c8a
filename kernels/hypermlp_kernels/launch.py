"""Host functions: tensors in, tensors out. The only part of the package that others import."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hypermlp_kernels.readout import readout_kernel
from hypermlp_kernels.rows import routing_statistic_kernel, selection_statistics_kernel
from hypermlp_kernels.schedule import block_table, sequences
from hypermlp_kernels.tiles import Kernel, Precision, Tile, family_of, pad_width, tiles

_LOG2E, _LN2 = 1.4426950408889634, 0.6931471805599453
_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32, torch.float64: tl.float64}
_INTERPRETED = not isinstance(readout_kernel, triton.JITFunction)
# small enough for the interpreter to be quick, with several row groups to a block
_INTERPRETER_TILE = Tile(32, 16, 16, 1, 1)


class Mix(NamedTuple):
    """One sequence mixing: ``diag [heads, L]``, ``down, up [heads, L, R]``, ``gate [B, T, heads, R]``; lag 0 first."""

    diag: Tensor | None
    down: Tensor | None
    up: Tensor | None
    gate: Tensor | None
    identity: bool

    @property
    def rank(self) -> int:
        return 0 if self.down is None else self.down.shape[-1]

    @property
    def scale_mode(self) -> str:
        return "table" if self.diag is not None else "identity" if self.identity else "zero"


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter (``TRITON_INTERPRET=1`` before triton is imported)."""
    return _INTERPRETED


class _Call(NamedTuple):
    """One call of :func:`forward`, prepared for the kernels."""

    q: Tensor
    k: Tensor
    v: Tensor
    routing: Mix
    readout: Mix
    z1: Tensor
    rho: Tensor
    z2: Tensor
    glu: bool
    by_lag: bool
    causal: bool
    norm: bool
    eps: float
    max_lag: int
    precision: Precision
    attention_mask: Tensor | None
    sequences: tuple[Tensor, Tensor, Tensor] | None
    chosen: Mapping[Kernel, Tile] | None

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.v.shape[0], self.v.shape[1], self.v.shape[2]

    @property
    def accumulator(self) -> torch.dtype:
        return torch.promote_types(self.q.dtype, torch.float32)

    @property
    def mix_dtype(self) -> torch.dtype:
        """Of the low-rank products: unnormalised rows outgrow float16, so there it is float32."""
        return torch.float32 if self.q.dtype == torch.float16 else self.q.dtype

    def options(self) -> dict[str, Any]:
        """What every kernel is compiled for."""
        return {
            "K": self.q.shape[-1],
            "GLU": self.glu,
            "BY_LAG": self.by_lag,
            "CAUSAL": self.causal,
            "HAS_BLOCKS": self.sequences is not None,
            "PACKED": self.glu and self.by_lag and self.q.dtype == torch.bfloat16,
            "ASM": not interpreted() and triton.runtime.driver.active.get_current_target().backend == "cuda",
            "ACC": _DTYPES[self.accumulator],
            "MIX": _DTYPES[self.mix_dtype],
            "PRECISION": "ieee" if self.precision == "ieee" else "tf32",
            "BK": pad_width(self.q.shape[-1]),
        }

    def blocks(self, rows: int) -> tuple[Tensor, int, int]:
        """Block table (or any tensor), its length, and programs for each of its blocks."""
        batch, length, heads = self.sizes
        if self.sequences is None:
            return self.q, triton.cdiv(length, rows), batch * heads
        table = block_table(self.sequences, batch, length, rows)
        return table, table.shape[0], heads


def precision_of(dtype: torch.dtype, allow_tf32: bool) -> Precision:
    """How products are made, which decides on the tiles."""
    if dtype in (torch.bfloat16, torch.float16):
        return "bf16" if dtype == torch.bfloat16 else "fp16"
    return "tf32" if allow_tf32 else "ieee"


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routing_mix: Mix,
    readout_mix: Mix,
    *,
    glu: bool,
    norm: bool,
    eps: float,
    causal: bool,
    by_lag: bool,
    max_lag: int | None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    allow_tf32: bool = False,
    chosen: Mapping[Kernel, Tile] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator and its row statistics, in memory linear in ``T``.

    Args:
        q: ``[B, T, S*H, K]``, gate maps first; any strides with a last one of 1 are taken as they are.
        k: like ``q``.
        v: ``[B, T, H, V]``.
        routing_mix: over ``S*H`` heads.
        readout_mix: over ``H`` heads.
        glu: two score maps a head, softplus(scale) * relu(gate); else one, relu(gate).
        norm: divide by the gate map's row norm, at least ``eps``.
        eps: see ``norm``.
        causal: hide keys after the query.
        by_lag: table rows are lags (causal only), else positions.
        max_lag: rows of the tables; by lag also the window. None without either.
        attention_mask: bool ``[B, T]``; masked tokens hold zeros in ``q, k, v`` and the gates.
        cu_seqlens: bounds of packed sequences, with a batch of 1.
        allow_tf32: whether float32 may be multiplied as tf32.
        chosen: each kernel's tile, instead of the table's.

    Returns:
        ``o [B, T, H, V]``, ``z1 [B, T, S*H, R]``, ``rho [B, T, H]`` and ``z2 [B, T, H, R]``, all in
        float32 (float64 for float64): the backward needs ``o`` unrounded.
    """
    q, k, v = (_unit_stride(x) for x in (q, k, v))
    batch, length, heads = v.shape[:3]
    kept = None
    if attention_mask is not None or cu_seqlens is not None:
        kept = sequences(attention_mask, cu_seqlens, batch, length, q.device)
    dtype = torch.promote_types(q.dtype, torch.float32)
    # without a mask every row belongs to a sequence, so the kernels write all of these
    new = torch.empty if attention_mask is None else torch.zeros
    o = new(v.shape, dtype=dtype, device=q.device)
    z1 = new((batch, length, q.shape[2], routing_mix.rank), dtype=dtype, device=q.device)
    z2 = new((batch, length, heads, readout_mix.rank), dtype=dtype, device=q.device)
    rho = torch.ones((batch, length, heads), dtype=dtype, device=q.device)
    call = _Call(
        q, k, v, routing_mix, readout_mix, z1, rho, z2, glu, by_lag, causal, norm, eps,
        length if max_lag is None else max_lag, precision_of(q.dtype, allow_tf32), attention_mask, kept, chosen,
    )  # fmt: skip
    with _on_device(q):
        if routing_mix.rank:
            _routing_statistic(call)
        if norm or readout_mix.rank:
            _selection_statistics(call)
        _readout(call, o)
    return o, z1, rho, z2


def _routing_statistic(call: _Call) -> None:
    down = _padded_table(call.routing.down, call.mix_dtype)

    def launch(tile: Tile) -> None:
        blocks, num_blocks, programs = call.blocks(tile.rows)
        routing_statistic_kernel[(num_blocks * programs,)](
            call.q, call.k, down, call.z1, blocks,
            *call.q.stride()[:3], *call.k.stride()[:3],
            call.sizes[1], call.max_lag, num_blocks, call.sizes[2],
            **call.options(), R=call.routing.rank, BR=down.shape[-1],
            **_tile_options(tile),
        )  # fmt: skip

    _run("routing_statistic", call, launch)


def _selection_statistics(call: _Call) -> None:
    dtype, routing, readout = call.mix_dtype, call.routing, call.readout
    scale, up = _first_scale(call), _padded_table(routing.up, dtype, call.q)
    down = _padded_table(readout.down, dtype, call.q)
    valid, gate = _holes(call), _gate(routing, call.q)

    def launch(tile: Tile) -> None:
        blocks, num_blocks, programs = call.blocks(tile.rows)
        selection_statistics_kernel[(num_blocks * programs,)](
            call.q, call.k, scale, up, gate, call.z1, down, call.rho, call.z2, blocks, valid,
            *call.q.stride()[:3], *call.k.stride()[:3], *gate.stride()[:3],
            call.sizes[1], call.max_lag, num_blocks, call.sizes[2], call.eps,
            **call.options(), R1=routing.rank, R2=readout.rank, HOLES=call.attention_mask is not None,
            SCALE1=routing.scale_mode, GATED1=routing.gate is not None, NORM=call.norm,
            BR1=pad_width(routing.rank), BR2=pad_width(readout.rank),
            **_tile_options(tile),
        )  # fmt: skip

    _run("selection_statistics", call, launch)


def _readout(call: _Call, o: Tensor) -> None:
    dtype, routing, readout = call.mix_dtype, call.routing, call.readout
    scale1, up1, gate1 = _first_scale(call), _padded_table(routing.up, dtype, call.q), _gate(routing, call.q)
    scale2 = _scale_table(readout, _LN2 if call.glu else 1.0, call)
    up2, gate2 = _padded_table(readout.up, dtype, call.q), _gate(readout, call.q)
    valid, count = _holes(call), _count_nonfinite(call.v)

    def launch(tile: Tile) -> None:
        blocks, num_blocks, programs = call.blocks(tile.rows)
        readout_kernel[(num_blocks * programs, triton.cdiv(o.shape[-1], tile.values))](
            call.q, call.k, call.v, scale1, up1, gate1, call.z1, scale2, up2, gate2, call.z2, call.rho, count, o,
            blocks, valid,
            *call.q.stride()[:3], *call.k.stride()[:3], *call.v.stride()[:3], *gate1.stride()[:3], *gate2.stride()[:3],
            call.sizes[1], call.max_lag, num_blocks, call.sizes[2],
            **call.options(), V=o.shape[-1], R1=routing.rank, R2=readout.rank, HOLES=call.attention_mask is not None,
            SCALE1=routing.scale_mode, GATED1=routing.gate is not None,
            SCALE2=readout.scale_mode, GATED2=readout.gate is not None, NORM=call.norm,
            EARLY=call.norm and call.q.dtype == torch.float16,
            BV=tile.values, BR1=pad_width(routing.rank), BR2=pad_width(readout.rank),
            **_tile_options(tile),
        )  # fmt: skip

    _run("readout", call, launch)


def _run(kernel: Kernel, call: _Call, launch: Callable[[Tile], None]) -> None:
    """Launch with the first tile that the device has shared memory for."""
    if call.chosen is not None:
        choices: tuple[Tile, ...] = (call.chosen[kernel],)
    elif interpreted():
        choices = (_INTERPRETER_TILE,)
    else:
        target = triton.runtime.driver.active.get_current_target()
        choices = tiles(kernel, call.precision, call.v.shape[-1], family_of(target.backend, target.arch))
    if not any(_fits(launch, choice) for choice in choices[:-1]):
        launch(choices[-1])


def _fits(launch: Callable[[Tile], None], tile: Tile) -> bool:
    try:
        launch(tile)
    except triton.OutOfResources:
        return False
    return True


def _tile_options(tile: Tile) -> dict[str, int]:
    return {"BM": tile.rows, "BN": tile.keys, "STAGES": tile.stages, "num_warps": tile.warps, "num_stages": tile.stages}


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _gate(mix: Mix, otherwise: Tensor) -> Tensor:
    return otherwise if mix.gate is None else _unit_stride(mix.gate)


def _holes(call: _Call) -> Tensor:
    """uint8 ``[B, T]``, 1 for a valid token; any tensor without a mask."""
    return call.q if call.attention_mask is None else call.attention_mask.to(torch.uint8).contiguous()


def _padded_table(table: Tensor | None, dtype: torch.dtype, otherwise: Tensor | None = None) -> Tensor:
    """``[heads, L, R]`` as a contiguous dot operand: the rank padded with zeros. Tables are small."""
    if table is None:
        assert otherwise is not None
        return otherwise
    rank = table.shape[-1]
    return torch.nn.functional.pad(table.to(dtype), (0, pad_width(rank) - rank)).contiguous()


def _scale_table(mix: Mix, unit: float | Tensor, call: _Call) -> Tensor:
    """``unit * (identity + diag)``, ``[heads, L]``; any tensor without a diagonal."""
    if mix.diag is None:
        return call.q
    return ((mix.diag.to(call.accumulator) + float(mix.identity)) * unit).contiguous()


def _first_scale(call: _Call) -> Tensor:
    """The first mixing's scale; the scale maps count in units of 1 / ln 2, for ``softplus2``."""
    heads = call.sizes[2]
    unit = torch.ones(call.q.shape[2], 1, dtype=call.accumulator, device=call.q.device)
    unit[heads:] *= _LOG2E
    return _scale_table(call.routing, unit, call)


def _count_nonfinite(v: Tensor) -> Tensor:
    """``[B, T + 1, H]`` int32: how many tokens before each hold a NaN or an infinity in that head."""
    batch, length, heads, _ = v.shape
    bad = ~torch.isfinite(torch.linalg.vector_norm(v, ord=float("inf"), dim=-1))
    count = torch.zeros(batch, length + 1, heads, dtype=torch.int32, device=v.device)
    count[:, 1:] = bad.cumsum(1, dtype=torch.int32)
    return count


def _on_device(x: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
