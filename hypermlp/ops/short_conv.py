"""The short depthwise causal convolution (paper: KV convolution) as a function, with its fused forms as operators.

``hypermlp::<path>_short_conv`` and ``hypermlp::<path>_short_conv_backward``, for the native and the triton path, carry
shapes for tracing (fake) and the gradient. Call :func:`short_conv` instead: it checks its arguments and these do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, List  # noqa: UP035 - torch 2.6 reads no other spelling in a signature

import torch
import torch.nn.functional as F
from torch import Tensor

from hypermlp.checks import check_kind
from hypermlp.ops import checked
from hypermlp.ops.attention import Backend, check_backend
from hypermlp.ops.checks import check_cu_seqlens
from hypermlp.ops.library import PATHS
from hypermlp.ops.paths import choose
from hypermlp.ops.varlen import sequence_starts, sequence_stops, within_bounds, zero_padded


def short_conv(
    x: Tensor,
    taps: Tensor,
    cu_seqlens: Tensor | None = None,
    past: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """``y_t = sum_r taps[:, -1 - r] x_{t-r}``, ``r`` from 0 to ``size - 1``.

    Args:
        x: ``[B, T, D]``; padded tokens hold zeros.
        taps: ``[D, size]``; the last one is the current token's.
        cu_seqlens: bounds of packed sequences, ``[N + 1]``: taps never reach into another. Tokens outside all
            of them are padding: whatever they hold, their output and their gradient are zero.
        past: the ``size - 1`` tokens before the first, ``[B, size - 1, D]``; None for zeros.
        backend: ``"triton"`` is one fused kernel, ``"native"`` is one in C++ for CPUs. ``"auto"`` takes that there,
            and on a GPU, outside of compiled graphs, the former once it has passed its self-check; every other choice
            is PyTorch's own operators, as is everything under ``torch.func`` transforms and in traced or ONNX models.

    Returns:
        ``[B, T, D]`` in the common dtype of ``x`` and ``taps``.

    Raises:
        ValueError: naming the argument, its value and the remedy.
    """
    check_backend(backend)
    _check(x, taps, cu_seqlens, past)
    path = None if 0 in x.shape[:2] else choose(backend, x)
    before = 0 if past is None else past.shape[1]
    name = None if path is None else path.name
    if name == checked.NAME and checked.takes_short_conv(x, taps, cu_seqlens, before, by_operators):
        name = "triton"
    fused = None if name is None or torch.promote_types(x.dtype, taps.dtype).is_complex else _FUSED.get(name)
    if fused is None:
        return by_operators(x, taps, cu_seqlens, past)
    y: Tensor = fused(x if past is None else torch.cat((past, x), dim=1), taps, cu_seqlens, before)
    return y


def _check(x: Tensor, taps: Tensor, cu_seqlens: Tensor | None, past: Tensor | None) -> None:
    check_kind("x", x, Tensor)
    check_kind("taps", taps, Tensor)
    if x.ndim != 3 or taps.ndim != 2 or x.shape[2] != taps.shape[0] or not taps.shape[1]:
        raise ValueError(
            f"x must be [B, T, D] and taps [D, size], size at least 1: got {tuple(x.shape)}, {tuple(taps.shape)}"
        )
    if taps.device != x.device:
        raise ValueError(f"taps are on {taps.device} and x on {x.device}: move them to one device")
    if cu_seqlens is not None and (not isinstance(cu_seqlens, Tensor) or cu_seqlens.device.type == "cpu"):
        check_cu_seqlens(cu_seqlens, x)  # on a GPU that would wait for all that it has still to do
    if past is None:
        return
    check_kind("past", past, Tensor)
    if cu_seqlens is not None:
        raise ValueError("past is for a batch with one sequence a row: packed sequences (cu_seqlens) begin afresh")
    expected = (x.shape[0], taps.shape[1] - 1, x.shape[2])
    if tuple(past.shape) != expected:
        raise ValueError(f"past must be [B, size - 1, D], {expected}, got {tuple(past.shape)}")


def by_operators(x: Tensor, taps: Tensor, cu_seqlens: Tensor | None, past: Tensor | None) -> Tensor:
    length, size = x.shape[1], taps.shape[1]
    x = zero_padded(x, within_bounds(length, cu_seqlens, x.device))
    padded = F.pad(x, (0, 0, size - 1, 0)) if past is None else torch.cat((past, x), dim=1)
    y = x * taps[:, -1]
    position = None
    if cu_seqlens is not None:
        position = torch.arange(length, device=x.device) - sequence_starts(length, cu_seqlens, x.device)
    for reach in range(1, size):
        start = size - 1 - reach
        tap = padded[:, start : start + length]
        if position is not None:
            tap = torch.where((position >= reach)[:, None], tap, 0)
        y = torch.addcmul(y, tap, taps[:, -1 - reach])
    return y


def _backward_operator(path: str) -> Any:
    """``hypermlp::<path>_short_conv_backward``."""

    @torch.library.custom_op(f"hypermlp::{path}_short_conv_backward", mutates_args=())
    def backward(
        grad_y: Tensor, x: Tensor, taps: Tensor, cu_seqlens: Tensor | None, past: int, needs: Sequence[bool]
    ) -> List[Tensor]:  # noqa: UP006
        """The gradients of ``x`` and of ``taps``, those that ``needs`` asks for."""
        stops = None if cu_seqlens is None else sequence_stops(x.shape[1], cu_seqlens, x.device).clamp(max=x.shape[1])
        grads = _kernels(path).backward(grad_y, x, taps, past=past, stops=stops, needs_x=needs[0], needs_taps=needs[1])
        return [grad for grad in grads if grad is not None]

    @backward.register_fake
    def _(
        grad_y: Tensor, x: Tensor, taps: Tensor, cu_seqlens: Tensor | None, past: int, needs: Sequence[bool]
    ) -> list[Tensor]:
        return [y.new_empty(y.shape) for y, need in zip((x, taps), needs, strict=True) if need]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.past, ctx.needs = inputs[4:]

    backward.register_autograd(_second_gradient, setup_context=setup_context)
    return backward


def _forward_operator(path: str, backward: Any) -> Any:
    """``hypermlp::<path>_short_conv``, with the gradient that :func:`_backward_operator` made."""

    @torch.library.custom_op(f"hypermlp::{path}_short_conv", mutates_args=())
    def forward(x: Tensor, taps: Tensor, cu_seqlens: Tensor | None, past: int) -> Tensor:
        """The convolution of ``x`` ``[B, past + T, D]``, of which the first ``past`` tokens are only read."""
        # where bounds could not be read and checked, nothing is read outside all the same
        starts = None if cu_seqlens is None else sequence_starts(x.shape[1], cu_seqlens, x.device).clamp(min=0)
        y: Tensor = _kernels(path).forward(x, taps, past=past, starts=starts)
        return y

    @forward.register_fake
    def _(x: Tensor, taps: Tensor, cu_seqlens: Tensor | None, past: int) -> Tensor:
        shape = (x.shape[0], x.shape[1] - past, x.shape[2])
        return x.new_empty(shape, dtype=torch.promote_types(x.dtype, taps.dtype))

    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, int], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.past = inputs[3]

    def gradient(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        needs = [bool(need) for need in ctx.needs_input_grad[:2]]
        grads = iter(backward(grad_y, *ctx.saved_tensors, ctx.past, needs))
        grad_x, grad_taps = (next(grads) if need else None for need in needs)
        return grad_x, grad_taps, None, None

    forward.register_autograd(gradient, setup_context=setup_context)
    return forward


def _second_gradient(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    """By PyTorch's own operators, which are differentiable any number of times."""
    grad_y, x, taps, cu_seqlens = ctx.saved_tensors
    with torch.enable_grad():
        inputs = [y.detach().requires_grad_() for y in (grad_y, x, taps)]
        past = inputs[1][:, : ctx.past] if ctx.past else None
        y = by_operators(inputs[1][:, ctx.past :], inputs[2], cu_seqlens, past)
        asked = [z for z, need in zip(inputs[1:], ctx.needs, strict=True) if need]
        first = torch.autograd.grad(y, asked, inputs[0].to(y.dtype), create_graph=True)
    return (*torch.autograd.grad(first, inputs, grads[0], allow_unused=True), None, None, None)


def _kernels(path: str) -> Any:
    """Imported when they are needed."""
    host = PATHS[path].short_conv
    assert host is not None
    return host()


_FUSED = {path: _forward_operator(path, _backward_operator(path)) for path in ("triton", "native")}
