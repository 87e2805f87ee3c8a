"""Host side of decoding: one new token against the cache's own memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from hypermlp_kernels.arguments import Options, SequenceMix
from hypermlp_kernels.call import DTYPES, FUSION, cuda_arch, gate_of, interpreted, on_device, unit_stride
from hypermlp_kernels.decode import (
    decode_readout_kernel,
    decode_scores_kernel,
    decode_selection_kernel,
    decode_sum_kernel,
)

# bytes that a vector load wants its address to be a multiple of
_ALIGNMENT = 16
# Programs a multiprocessor gets, and the fewest slots worth a program of their own. Two programs with a tile of
# 16 KiB each on the way hide the latency of memory on Hopper (3 TB/s over 132 multiprocessors, about 800 clocks).
_PROGRAMS_PER_PROCESSOR, _MIN_SLOTS = 2, 64
_ELEMENTS = {"keys": 4096, "values": 8192}
_SUM_SPLITS, _SUM_VALUES = 16, 64


class DecodeTile(NamedTuple):
    """Slots of a tile in each phase, channels of a value block, and warps. All powers of two."""

    score_slots: int
    selection_slots: int
    readout_slots: int
    values: int
    warps: int


class _Segments(NamedTuple):
    """The cache's keys or values: the older has ``slots``, and begins ``skip`` slots before the first of them."""

    older: Tensor
    newer: Tensor
    slots: int
    skip: int

    @classmethod
    def of(cls, segments: Sequence[Tensor]) -> _Segments:
        older, newer = segments[0], segments[-1]
        if older.stride() != newer.stride():  # no longer views of one memory: a compiler has made copies of them
            older = newer = torch.cat((older, newer), dim=2)
        slots = older.shape[2]
        # a ring's oldest slot may lie anywhere: the kernels begin a few slots earlier, where loads are aligned
        slot = older.stride(2) * older.element_size()
        offsets = ((older.data_ptr() - skip * slot) % _ALIGNMENT for skip in range(_ALIGNMENT))
        skip = next((skip for skip, offset in enumerate(offsets) if offset == 0), 0)
        first = older.storage_offset() - skip * older.stride(2)
        if skip == 0 or first < 0:
            return cls(older, newer, slots, 0)
        return cls(older.as_strided(older.shape, older.stride(), first), newer, slots, skip)

    @property
    def slots_last(self) -> bool:
        return self.older.stride(2) == 1 and self.older.stride(3) != 1


class _Call(NamedTuple):
    """One call of :func:`decode`, prepared for the kernels."""

    q: Tensor
    keys: _Segments
    values: _Segments
    routing: SequenceMix
    readout: SequenceMix
    valid: Tensor | None
    start: Tensor | None
    length: Tensor | None
    slots: int
    num_splits: int
    options: Options
    tile: DecodeTile

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def heads(self) -> int:
        return self.values.older.shape[1]

    @property
    def grid(self) -> tuple[int, int]:
        return self.batch * self.heads, self.num_splits

    @property
    def max_lag(self) -> int:
        return self.slots if self.options.max_lag is None else self.options.max_lag

    @property
    def accumulator(self) -> torch.dtype:
        return torch.promote_types(self.q.dtype, torch.float32)

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.accumulator, device=self.q.device)

    @property
    def places(self) -> tuple[Tensor, Tensor, Tensor]:
        """Validity, rows' starts and number of tokens so far; any tensor where there is none."""
        valid = self.q if self.valid is None else self.valid.view(torch.uint8)
        return valid, self.q if self.start is None else self.start, self.q if self.length is None else self.length

    @property
    def valid_strides(self) -> tuple[int, int]:
        return (0, 0) if self.valid is None else (self.valid.stride(0), self.valid.stride(1))

    def constants(self) -> dict[str, Any]:
        """What every phase is compiled for."""
        return {
            "BY_LAG": self.start is None,
            "RING": self.length is not None,
            "HOLES": self.valid is not None,
            "ACC": DTYPES[self.accumulator],
            "num_warps": self.tile.warps,
            **FUSION,
        }

    def mixing(self, mix: SequenceMix) -> dict[str, Any]:
        return {"DIAG": mix.diag is not None, "IDENTITY": mix.identity, "GATED": mix.core is not None}


def decode(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    routing_mix: SequenceMix,
    readout_mix: SequenceMix,
    options: Options,
    *,
    valid: Tensor | None = None,
    start: Tensor | None = None,
    length: Tensor | None = None,
    chosen: DecodeTile | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """One new token per row against cached ones, which include it.

    Nothing of the cache is copied and the host never waits for the device. The grid depends on shapes alone.

    Args:
        q: ``[B, 1, S*H, K]``, gate maps first.
        keys: one or two segments ``[B, S*H, n, K]``, oldest first, with any strides; two are read in place if they
            are views of one memory.
        values: segments ``[B, H, n, V]``, cut at the same places.
        routing_mix: over ``S*H`` heads, gate ``[B, 1, S*H, R]``.
        readout_mix: over ``H`` heads.
        options: the switches; ``max_lag`` is the rows of the tables, and by lag the window, or None for neither.
        valid: bool ``[B, n]`` over all slots; hidden tokens hold zeros.
        start: int64 ``[B]``: the slot of table row 0, for tables by position. None for tables by lag.
        length: 0-dim int64 on the device: tokens there have been in a ring, whose one segment has each token in slot
            ``number % n``. None where slots run from the oldest token to the newest.
        chosen: the tile, instead of the rule's.
        num_splits: programs that share a head's slots, instead of the rule's.

    Returns:
        ``[B, 1, H, V]`` in the dtype of ``q``.
    """
    if length is not None and (len(keys) != 1 or start is not None):
        raise ValueError(f"length needs one segment and tables by lag, got {len(keys)} segments, start={start}")
    batch, heads, _, value_width = values[0].shape
    slots = sum(part.shape[2] for part in keys)
    key_parts, value_parts = _Segments.of(keys), _Segments.of(values)
    if num_splits is None:
        num_splits = splits(batch * heads, slots, _processors(q.device))
    routing_mix, readout_mix = (_with_unit_strides(mix) for mix in (routing_mix, readout_mix))
    call = _Call(
        unit_stride(q), key_parts, value_parts, routing_mix, readout_mix, valid, start, length,
        slots, num_splits, options, chosen or _tile(key_parts, value_parts),
    )  # fmt: skip
    o = torch.empty((batch, 1, heads, value_width), dtype=q.dtype, device=q.device)
    with on_device(q):
        s, z1 = _scores(call)
        a, square, z2 = _selection(call, s, z1)
        parts = _readout(call, a, square, z2)
        width = min(_SUM_VALUES, triton.next_power_of_2(value_width))
        decode_sum_kernel[(batch * heads, triton.cdiv(value_width, width))](
            parts, o, num_splits, V=value_width, ACC=DTYPES[call.accumulator], BS=_SUM_SPLITS, BV=width, num_warps=2,
            **FUSION,
        )  # fmt: skip
    return o


def splits(rows: int, slots: int, processors: int) -> int:
    """Programs that share the slots of each of ``rows`` heads: enough to fill the device, none with too few slots."""
    wanted = -(-_PROGRAMS_PER_PROCESSOR * processors // rows)
    return max(1, min(wanted, -(-slots // _MIN_SLOTS)))


def _scores(call: _Call) -> tuple[Tensor, Tensor]:
    q, keys, mix = call.q, call.keys, call.routing
    maps, width = q.shape[2], q.shape[3]
    s, z1 = call.new(call.batch, maps, call.slots), call.new(call.batch, maps, call.num_splits, mix.rank)
    down = q if mix.down is None else mix.down
    decode_scores_kernel[call.grid](
        q, keys.older, keys.newer, down, *call.places, s, z1,
        q.stride(0), q.stride(2), *keys.older.stride(), *_table_strides(mix.down), *call.valid_strides,
        keys.slots, call.slots, keys.skip, call.num_splits, call.heads, call.batch, call.max_lag,
        K=width, R=mix.rank, GLU=call.options.glu, SLOTS_LAST=keys.slots_last,
        BN=call.tile.score_slots, BK=triton.next_power_of_2(width), BR=_padded_rank(mix),
        **call.constants(),
    )  # fmt: skip
    return s, z1


def _selection(call: _Call, s: Tensor, z1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    routing, readout = call.routing, call.readout
    rows = call.batch, call.heads
    a, square = call.new(*rows, call.slots), call.new(*rows, call.num_splits, 2)
    z2 = call.new(*rows, call.num_splits, readout.rank)
    down = call.q if readout.down is None else readout.down
    diag, up, gate = _tables(routing, call.q)
    decode_selection_kernel[call.grid](
        s, z1, diag, up, gate, down, *call.places, a, square, z2,
        *_table_strides(routing.diag)[:1], *_table_strides(routing.up), gate.stride(0), gate.stride(2),
        *_table_strides(readout.down), *call.valid_strides,
        call.keys.slots, call.slots, call.num_splits, call.heads, call.batch, call.max_lag,
        R1=routing.rank, R2=readout.rank, GLU=call.options.glu, NORM=call.options.norm, ASM=cuda_arch() is not None,
        BN=call.tile.selection_slots, BS=_SUM_SPLITS, BR1=_padded_rank(routing), BR2=_padded_rank(readout),
        **call.mixing(routing), **call.constants(),
    )  # fmt: skip
    return a, square, z2


def _readout(call: _Call, a: Tensor, square: Tensor, z2: Tensor) -> Tensor:
    values, mix = call.values, call.readout
    width = values.older.shape[3]
    parts = call.new(call.batch, call.heads, call.num_splits, width)
    diag, up, gate = _tables(mix, call.q)
    decode_readout_kernel[(*call.grid, triton.cdiv(width, call.tile.values))](
        a, square, z2, diag, up, gate, values.older, values.newer, *call.places, parts,
        *_table_strides(mix.diag)[:1], *_table_strides(mix.up), gate.stride(0), gate.stride(2),
        *values.older.stride(), *call.valid_strides,
        values.slots, call.slots, values.skip, call.num_splits, call.heads, call.batch, call.max_lag, call.options.eps,
        V=width, R=mix.rank, NORM=call.options.norm, SLOTS_LAST=values.slots_last,
        BN=call.tile.readout_slots, BS=_SUM_SPLITS, BR=_padded_rank(mix), BV=call.tile.values,
        **call.mixing(mix), **call.constants(),
    )  # fmt: skip
    return parts


def _tile(keys: _Segments, values: _Segments) -> DecodeTile:
    """The static rule: so many elements, and no fewer slots than two sectors of memory where they lie along it."""
    if interpreted():
        return DecodeTile(16, 16, 16, 16, 1)
    width, value_width = (triton.next_power_of_2(part.older.shape[3]) for part in (keys, values))
    fewest = 32 if keys.slots_last else 16
    score_slots = min(max(_ELEMENTS["keys"] // width, fewest), 128)
    channels = min(128 if values.slots_last else 256, value_width)
    return DecodeTile(score_slots, 128, min(_ELEMENTS["values"] // channels, 128), channels, 4)


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _with_unit_strides(mix: SequenceMix) -> SequenceMix:
    """Parameters and gates as they are, unless someone made their last dimension a strided one."""
    diag, down, up, gate = (x if x is None else unit_stride(x) for x in mix.tensors)
    return SequenceMix(diag, down, up, gate, mix.identity)


def _tables(mix: SequenceMix, otherwise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    diag, up = (otherwise if table is None else table for table in (mix.diag, mix.up))
    return diag, up, gate_of(mix, otherwise)


def _table_strides(table: Tensor | None) -> tuple[int, int]:
    return (0, 0) if table is None else (table.stride(0), table.stride(1))


def _padded_rank(mix: SequenceMix) -> int:
    return int(triton.next_power_of_2(max(1, mix.rank)))
