"""Host side of the short convolution: tensors in, tensors out."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from hypermlp_kernels.call import DTYPES, FUSION, interpreted, on_device, unit_stride
from hypermlp_kernels.short_conv import short_conv_backward_kernel, short_conv_kernel


class ConvTile(NamedTuple):
    """Tokens and channels of a tile, and warps. All powers of two."""

    tokens: int
    channels: int
    warps: int


def forward(x: Tensor, taps: Tensor, *, past: int = 0, starts: Tensor | None = None) -> Tensor:
    """``y_t = sum_r taps[:, -1 - r] x_{t-r}``, each number of ``x`` read from memory once and sums in float32.

    Args:
        x: ``[B, past + T, D]``; any strides with a last one of 1 are taken as they are.
        taps: ``[D, size]``, any strides; the last tap is the current token's.
        past: tokens that are read and get no output. Before the first of them lie zeros.
        starts: integer ``[T]``, the first position of each token's sequence, which taps do not reach past;
            with ``past=0``. None for one sequence a row.

    Returns:
        ``y`` ``[B, T, D]`` in the common dtype of ``x`` and ``taps``.
    """
    x = unit_stride(x)
    batch, length, channels = x.shape[0], x.shape[1] - past, x.shape[2]
    y = torch.empty((batch, length, channels), dtype=torch.promote_types(x.dtype, taps.dtype), device=x.device)
    tile = _tile(x, backward=False)
    num_blocks = triton.cdiv(length, tile.tokens)
    with on_device(x):
        short_conv_kernel[(batch * num_blocks * triton.cdiv(channels, tile.channels),)](
            x, taps, x if starts is None else starts, y,
            x.stride(0), x.stride(1), *taps.stride(), length, past, channels, num_blocks,
            SIZE=taps.shape[1], PACKED=starts is not None, ALIGNED=_aligned(x), ACC=_accumulator(y.dtype),
            BT=tile.tokens, BD=tile.channels, num_warps=tile.warps, **FUSION,
        )  # fmt: skip
    return y


def backward(
    grad_y: Tensor,
    x: Tensor,
    taps: Tensor,
    *,
    past: int = 0,
    stops: Tensor | None = None,
    needs_x: bool = True,
    needs_taps: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of ``x`` and ``taps``, None where not needed, from one read of ``x`` and ``grad_y``.

    The order of every sum is fixed: the same input gives the same bits.

    Args:
        grad_y: ``[B, T, D]``.
        x: as in :func:`forward`; not read if ``taps`` needs no gradient.
        taps: as in :func:`forward`.
        past: as in :func:`forward`.
        stops: integer ``[T]``, one past the last position of each token's sequence.
        needs_x: whether to compute the gradient of ``x``.
        needs_taps: whether to compute that of ``taps``.
    """
    grad_y, x = unit_stride(grad_y), unit_stride(x)
    batch, length, channels, size = x.shape[0], x.shape[1] - past, x.shape[2], taps.shape[1]
    tile = _tile(grad_y, backward=True)
    num_blocks = triton.cdiv(x.shape[1], tile.tokens)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs_x else None
    parts = None
    if needs_taps:
        dtype = torch.promote_types(grad_y.dtype, torch.float32)
        parts = torch.empty((batch * num_blocks, size, channels), dtype=dtype, device=x.device)
    with on_device(x):
        short_conv_backward_kernel[(batch * num_blocks * triton.cdiv(channels, tile.channels),)](
            grad_y, x, taps, x if stops is None else stops, x if grad_x is None else grad_x,
            x if parts is None else parts,
            grad_y.stride(0), grad_y.stride(1), x.stride(0), x.stride(1), *taps.stride(),
            length, past, channels, num_blocks,
            SIZE=size, PACKED=stops is not None, INPUT=needs_x, TAPS=needs_taps,
            ALIGNED_DY=_aligned(grad_y), ALIGNED=_aligned(x), ACC=_accumulator(grad_y.dtype),
            BT=tile.tokens, BD=tile.channels, num_warps=tile.warps, **FUSION,
        )  # fmt: skip
    return grad_x, None if parts is None else parts.sum(0).mT.contiguous().to(taps.dtype)


def _tile(x: Tensor, backward: bool) -> ConvTile:
    """32 numbers a thread, in half precision. The backward's tiles are long, since each leaves a part of a sum."""
    if interpreted():
        return ConvTile(16, 16, 1)
    tokens, row_bytes = (128, 64) if backward else (64, 128)
    return ConvTile(tokens, min(row_bytes // x.element_size(), triton.next_power_of_2(x.shape[2])), 4)


def _aligned(x: Tensor) -> bool:
    """Whether every token begins at a multiple of 16 elements: of a compact tensor, whatever its length."""
    return all(stride % 16 == 0 for stride in x.stride()[:2])


def _accumulator(dtype: torch.dtype) -> object:
    return DTYPES[torch.promote_types(dtype, torch.float32)]
