"""Host functions of the short convolution: tensors in, tensors out."""

from __future__ import annotations

import torch
from torch import Tensor

from hypermlp_kernels.native import abi
from hypermlp_kernels.native.build import library
from hypermlp_kernels.native.launch import enter


def forward(x: Tensor, taps: Tensor, *, past: int, starts: Tensor | None) -> Tensor:
    """``y`` ``[B, T, D]`` in the common dtype, computed in float32, or float64 for float64.

    Args:
        x: ``[B, past + T, D]``, on a CPU, of any float dtype; the first ``past`` tokens are only read.
        taps: ``[D, size]``, the last one is the current token's.
        past: see ``x``.
        starts: int64 ``[past + T]``, first position of each token's sequence; None: one sequence a row.
    """
    call, kept, dtype = _call(x, taps, past)
    batch, length, channels = x.shape
    y = torch.empty(batch, length - past, channels, dtype=dtype)
    call.y = y.data_ptr()
    if starts is not None:
        kept.append(starts.contiguous())
        call.starts = kept[-1].data_ptr()
    if y.numel():
        enter(library(dtype), "conv", call, dtype)
    return y.to(torch.promote_types(x.dtype, taps.dtype))


def backward(
    grad_y: Tensor, x: Tensor, taps: Tensor, *, past: int, stops: Tensor | None, needs_x: bool, needs_taps: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of ``x`` and ``taps``; None where none was asked for. ``stops``: one past each sequence's last."""
    call, kept, dtype = _call(x, taps, past)
    kept.append(_dense(grad_y.to(kept[0].dtype)))
    call.grad_y = _stream(kept[-1])
    dx = torch.empty(x.shape, dtype=dtype) if needs_x else None
    dtaps = torch.zeros(taps.shape, dtype=dtype) if needs_taps else None
    call.dx, call.dtaps = (None if y is None else y.data_ptr() for y in (dx, dtaps))
    if stops is not None:
        kept.append(stops.contiguous())
        call.stops = kept[-1].data_ptr()
    if x.numel():
        enter(library(dtype), "conv", call, dtype)
    return (None if dx is None else dx.to(x.dtype)), (None if dtaps is None else dtaps.to(taps.dtype))


def _call(x: Tensor, taps: Tensor, past: int) -> tuple[abi.ConvCall, list[Tensor], torch.dtype]:
    """The call, tensors to keep alive while it runs, and the precision of the computation."""
    promoted = torch.promote_types(x.dtype, taps.dtype)
    dtype = torch.promote_types(promoted, torch.float32)
    # bfloat16 and float16 are converted as they are read, where y and its gradient are of the same type
    read = x.dtype if promoted == x.dtype and abi.type_code(x.dtype) else dtype
    kept = [_dense(x.to(read)), taps.detach().to(dtype).contiguous()]
    call = abi.ConvCall()
    call.type = abi.type_code(read)
    call.batch, call.length, call.channels = x.shape
    call.past, call.size, call.threads = past, taps.shape[1], torch.get_num_threads()
    call.x, call.taps = _stream(kept[0]), kept[1].data_ptr()
    return call, kept, dtype


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _stream(x: Tensor) -> abi.Stream:
    return abi.Stream(x.data_ptr(), x.stride(0), x.stride(1), 0)
