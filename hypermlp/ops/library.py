"""Paths as operators of PyTorch: opaque to the compiler, known to autograd and export.

``hypermlp::<path>_forward`` and ``hypermlp::<path>_backward``, for the chunked, native and triton path, carry
shapes for tracing (fake), the gradient, autocast and a FLOP formula. Call
:func:`hypermlp.ops.hyper_attention` instead: it checks its arguments and these do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, List, TypeVar  # noqa: UP035 - torch 2.6 reads no other spelling in a signature

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hypermlp.ops import chunked
from hypermlp.ops.chunked_backward import Needs, backward
from hypermlp.ops.flops import backward_flops, forward_flops, visible_pairs
from hypermlp.ops.mixing import SequenceMix
from hypermlp.ops.modes import values_readable
from hypermlp.ops.tiling import Options

_TensorOrNone = TypeVar("_TensorOrNone", Tensor, None, Tensor | None)
Forward = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
Backward = Callable[..., tuple[Tensor | None, ...]]
_NUM_TENSORS = 11  # q, k, v and four tensors of each mixing: the inputs with a gradient


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    batch, length, num_maps, _ = q.shape
    routing_down, readout_down = args[1], args[5]
    rank1, rank2 = (0 if down is None else down.shape[-1] for down in (routing_down, readout_down))
    return (
        v.new_empty((batch, length, *v.shape[2:]), dtype=dtype),
        q.new_empty((batch, length, num_maps, rank1), dtype=dtype),
        q.new_empty((batch, length, v.shape[2]), dtype=dtype),
        q.new_empty((batch, length, v.shape[2], rank2), dtype=dtype),
    )


def _fake_backward(
    grad_o: Tensor, o: Tensor, z1: Tensor, rho: Tensor, z2: Tensor, needs: Sequence[bool], *args: Any
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x, need in zip(args[:_NUM_TENSORS], needs, strict=True) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    num_saved = _NUM_TENSORS + 2  # the mask and cu_seqlens too
    ctx.save_for_backward(*inputs[:num_saved], *output)
    ctx.options = inputs[num_saved:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def cast_for_autocast(x: _TensorOrNone, device_type: str) -> _TensorOrNone:
    """``x`` as autocast wants the inputs of a matrix product; float64 stays, as everywhere in autocast."""
    if x is None or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(device_type))


def _register_autocast(name: str, operator: Any, device_type: str, key: str) -> None:
    def kernel(*args: Any) -> Any:
        # the tables keep their own precision: they are parameters, and small
        streams = {0, 1, 2, 6, 10}
        cast = [cast_for_autocast(arg, device_type) if i in streams else arg for i, arg in enumerate(args)]
        with torch.autocast(device_type, enabled=False):
            return operator(*cast)

    _LIBRARY.impl(name, kernel, key)  # type: ignore[no-untyped-call]


_LIBRARY = torch.library.Library("hypermlp", "FRAGMENT")  # type: ignore[no-untyped-call]


def _sizes(q: Tensor, v: Tensor, routing_down: Tensor | None, readout_down: Tensor | None) -> dict[str, Any]:
    num_heads = v.shape[2]
    ranks = tuple(0 if down is None else down.shape[-1] for down in (routing_down, readout_down))
    return {
        "num_heads": num_heads,
        "num_maps": q.shape[2] // num_heads,
        "qk": q.shape[3],
        "v": v.shape[3],
        "ranks": ranks,
    }


def _pairs(q: Tensor, cu_seqlens: Tensor | None, causal: bool, layout: str, max_lag: int | None) -> int:
    window = max_lag if layout == "lag" else None
    readable = cu_seqlens is not None and values_readable(cu_seqlens, wait=True)
    bounds = cu_seqlens.tolist() if cu_seqlens is not None and readable else [0, q.shape[1]]  # at most
    lengths = [stop - start for start, stop in pairwise(bounds)]
    return q.shape[0] * sum(visible_pairs(n, causal=causal, max_lag=window) for n in lengths)


def _forward_flops(*args: Any, out_val: Any = None) -> int:
    pairs = _pairs(args[0], args[12], *args[18:21])
    return forward_flops(pairs, **_sizes(args[0], args[2], args[4], args[8]))


def _backward_flops(*args: Any, out_val: Any = None) -> int:
    args = args[6:]
    pairs = _pairs(args[0], args[12], *args[18:21])
    return backward_flops(pairs, **_sizes(args[0], args[2], args[4], args[8]))


def backward_operator(name: str, backward: Backward) -> Any:
    """``hypermlp::<name>``: ``backward`` with a fake, FLOPs, and a clear error for a second derivative.

    Args:
        name: ends in ``_backward``.
        backward: takes ``grad_o``, the forward's ``o`` and ``(z1, rho, z2)``, its eight arguments, and
            after the two mixings :class:`~hypermlp.ops.chunked_backward.Needs`; gives a gradient for each
            of the eleven tensors in the order of the inputs, None where none was asked for.
    """

    @torch.library.custom_op(f"hypermlp::{name}", mutates_args=())
    def operator(
        grad_o: Tensor,
        o: Tensor,
        z1: Tensor,
        rho: Tensor,
        z2: Tensor,
        needs: Sequence[bool],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        routing_diag: Tensor | None,
        routing_down: Tensor | None,
        routing_up: Tensor | None,
        routing_gate: Tensor | None,
        readout_diag: Tensor | None,
        readout_down: Tensor | None,
        readout_up: Tensor | None,
        readout_gate: Tensor | None,
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        routing_identity: bool,
        readout_identity: bool,
        selection: str,
        norm: bool,
        eps: float,
        causal: bool,
        layout: str,
        max_lag: int | None,
    ) -> List[Tensor]:  # noqa: UP006
        routing_mix = SequenceMix(routing_diag, routing_down, routing_up, routing_gate, routing_identity)
        readout_mix = SequenceMix(readout_diag, readout_down, readout_up, readout_gate, readout_identity)
        options = Options(selection, norm, eps, causal, layout, max_lag)
        wanted = Needs(needs[0], needs[1], needs[2], tuple(needs[3:7]), tuple(needs[7:11]))  # type: ignore[arg-type]
        with torch.autocast(q.device.type, enabled=False):
            grads = backward(
                grad_o, o, (z1, rho, z2), q, k, v, routing_mix, readout_mix,
                wanted, options, attention_mask, cu_seqlens,
            )  # fmt: skip
        inputs = (q, k, v, *routing_mix[:4], *readout_mix[:4])
        return [grad.to(x.dtype) for grad, x in zip(grads, inputs, strict=True) if grad is not None and x is not None]

    def double_backward(ctx: Any, *grads: Any) -> Any:
        path = name.removesuffix("_backward")
        raise RuntimeError(
            f"the {path} path of hyper_attention has first derivatives only: "
            "use backend='reference' to differentiate twice"
        )

    operator.register_fake(_fake_backward)
    operator.register_autograd(double_backward)
    registered = getattr(torch.ops.hypermlp, name)
    register_flop_formula(registered, get_raw=True)(_backward_flops)
    return registered


def forward_operator(name: str, forward: Forward, backward: Any) -> Forward:
    """``hypermlp::<name>``: ``forward`` with a fake, a gradient, autocast and FLOPs.

    Args:
        name: ends in ``_forward``.
        forward: with the arguments and results of :func:`hypermlp.ops.chunked.forward`.
        backward: its gradient, made by :func:`backward_operator`.
    """

    @torch.library.custom_op(f"hypermlp::{name}", mutates_args=())
    def operator(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        routing_diag: Tensor | None,
        routing_down: Tensor | None,
        routing_up: Tensor | None,
        routing_gate: Tensor | None,
        readout_diag: Tensor | None,
        readout_down: Tensor | None,
        readout_up: Tensor | None,
        readout_gate: Tensor | None,
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        routing_identity: bool,
        readout_identity: bool,
        selection: str,
        norm: bool,
        eps: float,
        causal: bool,
        layout: str,
        max_lag: int | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        routing_mix = SequenceMix(routing_diag, routing_down, routing_up, routing_gate, routing_identity)
        readout_mix = SequenceMix(readout_diag, readout_down, readout_up, readout_gate, readout_identity)
        options = Options(selection, norm, eps, causal, layout, max_lag)
        with torch.autocast(q.device.type, enabled=False):
            return forward(q, k, v, routing_mix, readout_mix, options, attention_mask, cu_seqlens)

    def gradient(ctx: Any, grad_o: Tensor | None, *_: Any) -> tuple[Any, ...]:
        num_inputs = len(ctx.needs_input_grad)
        if grad_o is None:
            return (None,) * num_inputs
        saved = ctx.saved_tensors  # read once: activation checkpointing refuses a second time
        inputs, output = saved[:-4], saved[-4:]
        needs = [bool(need) for need in ctx.needs_input_grad[:_NUM_TENSORS]]
        grads = iter(backward(grad_o, *output, needs, *inputs, *ctx.options))
        return tuple(next(grads) if need else None for need in needs) + (None,) * (num_inputs - _NUM_TENSORS)

    operator.register_fake(_fake_forward)
    operator.register_autograd(gradient, setup_context=_setup_context)
    registered = getattr(torch.ops.hypermlp, name)
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _register_autocast(name, registered, device_type, key)
    register_flop_formula(registered, get_raw=True)(_forward_flops)
    return operator


def chunked_backward_of(
    grad_o: Tensor,
    o: Tensor,
    statistics: tuple[Tensor, Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routing_mix: SequenceMix,
    readout_mix: SequenceMix,
    needs: Needs,
    options: Options,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The chunked path's gradients, with the arguments of every path's."""
    x = chunked.Operands(q, k, v, routing_mix, readout_mix, options, attention_mask, cu_seqlens, statistics)
    return backward(grad_o, o, x, options, needs, attention_mask, cu_seqlens)


chunked_backward = backward_operator("chunked_backward", chunked_backward_of)
chunked_forward = forward_operator("chunked_forward", chunked.forward, chunked_backward)
