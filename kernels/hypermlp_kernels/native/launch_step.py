"""Host function of a step after a cache: tensors in, tensors out."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from hypermlp_kernels.arguments import Options, SequenceMix
from hypermlp_kernels.native import abi
from hypermlp_kernels.native.build import library
from hypermlp_kernels.native.launch import enter

_LAG, _POSITION, _RING = range(3)
# elements of keys and values that are worth a thread of their own
_ELEMENTS_A_THREAD = 1 << 20


def step(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    routing_mix: SequenceMix,
    readout_mix: SequenceMix,
    options: Options,
    *,
    valid: Tensor | None,
    start: Tensor | None,
    length: Tensor | None,
) -> Tensor:
    """``o`` ``[B, H*V]`` of the newest token, which the cache includes, in float32, or float64 for float64.

    Args:
        q: ``[B, S*H*K]``, on a CPU, of any float dtype.
        keys: segments ``[B * S*H, K, n_i]``, oldest first; values: segments ``[B * H, n_i, V]``.
        routing_mix, readout_mix: gates ``[B, heads, R]``.
        options: the switches.
        valid: bool ``[B, n]``, or None if every token counts.
        start: int64 ``[B]``, the slot of table row 0, for tables by position.
        length: tokens there have been, where the one segment is a ring.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    call, batch, kept = abi.StepCall(), q.shape[0], [q]
    call.batch, call.maps, call.qk, call.v = batch, options.num_maps, keys[0].shape[1], values[0].shape[2]
    call.heads = values[0].shape[0] // batch
    call.type, call.norm, call.eps = abi.type_code(q.dtype), options.norm, options.eps
    elements = sum(x.numel() for x in (*keys, *values))
    call.threads = max(1, min(torch.get_num_threads(), elements // _ELEMENTS_A_THREAD))
    call.q = abi.Stream(q.data_ptr(), q.stride(0), 0, call.qk)
    call.routing, call.readout = (_mix(mix, dtype, kept) for mix in (routing_mix, readout_mix))
    tables = [x for mix in (routing_mix, readout_mix) for x in mix.tables if x is not None]
    call.lags = tables[0].shape[1] if tables else 0
    segments = (abi.Segment * len(keys))(*(_segment(*pair, kept) for pair in zip(keys, values, strict=True)))
    call.segments, call.num_segments = ctypes.addressof(segments), len(keys)
    if length is not None:
        call.order, call.length = _RING, int(length)
    elif start is not None:
        kept.append(start.contiguous())
        call.order, call.start = _POSITION, kept[-1].data_ptr()
    if valid is not None:
        kept.append(valid.contiguous())
        call.valid = kept[-1].data_ptr()
    o = torch.empty(batch, call.heads * call.v, dtype=dtype)
    call.o = o.data_ptr()
    enter(library(dtype), "step", call, dtype)
    return o


def _segment(keys: Tensor, values: Tensor, kept: list[Tensor]) -> abi.Segment:
    if values.stride(2) != 1:
        values = values.contiguous()
        kept.append(values)
    head, row, slot = keys.stride()
    return abi.Segment(
        keys.data_ptr(), values.data_ptr(), head, row, slot, values.stride(0), values.stride(1), keys.shape[2]
    )


def _mix(mix: SequenceMix, dtype: torch.dtype, kept: list[Tensor]) -> abi.Mix:
    def address(x: Tensor | None) -> int | None:
        if x is None:
            return None
        kept.append(x.detach().to(dtype).contiguous())
        return kept[-1].data_ptr()

    gate = abi.Stream()
    if mix.core is not None:
        kept.append(mix.core if mix.core.stride(-1) == 1 else mix.core.contiguous())
        gate = abi.Stream(kept[-1].data_ptr(), kept[-1].stride(0), 0, kept[-1].stride(1))
    return abi.Mix(*(address(x) for x in mix.tables), gate, mix.rank, mix.identity)
