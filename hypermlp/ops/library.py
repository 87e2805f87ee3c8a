"""Paths as operators of PyTorch: opaque to the compiler, known to autograd and export.

``hypermlp::<path>_forward`` and ``hypermlp::<path>_backward`` carry shapes for tracing (fake), the gradient,
autocast and a FLOP formula. Call :func:`hypermlp.ops.hyper_attention` instead: it checks its arguments and these
do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hypermlp.ops.arguments import DIFFERENTIABLE, SCHEMA, Gradients, Needs, OperatorArgs, Outputs, signature
from hypermlp.ops.flops import backward_flops, forward_flops, visible_pairs
from hypermlp.ops.modes import values_readable

if TYPE_CHECKING:
    from hypermlp.ops.decode import StepArgs


class Path(NamedTuple):
    """One way to compute the operator.

    Attributes:
        name: the ``backend=`` that asks for it.
        forward: of what ``hyper_attention`` has checked; padded tokens hold zeros.
        backward: gradients of ``grad_o``, the forward's outputs, its arguments, and which are asked for.
        unavailable: why it cannot take an input like a tensor, or None if it can.
        step: the newest token against a cache, see :func:`hypermlp.ops.decode.decode_step`.
        takes_blocks: whether ``q`` may have fewer rows than ``k``, the last tokens'.
        short_conv: imports its kernels of the short convolution; None: it has none.
    """

    name: str
    forward: Callable[[OperatorArgs], Outputs]
    backward: Callable[[Tensor, Outputs, OperatorArgs, Needs], Gradients]
    unavailable: Callable[[Tensor], str | None]
    step: Callable[[StepArgs], Tensor]
    takes_blocks: bool = False
    short_conv: Callable[[], ModuleType] | None = None


# what a backward takes before the forward's arguments
_OF_OUTPUTS = {"grad_o": "Tensor", **dict.fromkeys(Outputs._fields, "Tensor"), "needs": "bool[]"}
PATHS: dict[str, Path] = {}  # by name; the operators look here when they run
_FORWARD: dict[str, Any] = {}
_LIBRARY = torch.library.Library("hypermlp", "FRAGMENT")  # type: ignore[no-untyped-call]


def register(path: Path) -> None:
    """Make the operators of ``path``."""
    PATHS[path.name] = path
    _FORWARD[path.name] = _forward_operator(path.name, _backward_operator(path.name))


def run(path: Path, x: OperatorArgs) -> Tensor:
    """``o`` of ``path`` in the dtype of ``q``, differentiable, in eager mode and in every graph."""
    o: Tensor = _FORWARD[path.name](*x.flatten())[0]
    return o.to(x.q.dtype)


def _forward_operator(name: str, backward: Any) -> Any:
    """``hypermlp::<name>_forward`` with a fake, a gradient, autocast and FLOPs."""

    def forward(*flat: Any) -> Outputs:
        x = OperatorArgs.unflatten(flat)
        with torch.autocast(x.q.device.type, enabled=False):
            return PATHS[name].forward(x)

    def gradient(ctx: Any, grad_o: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad_o is None:
            return (None,) * len(SCHEMA)
        *tensors, o, z1, rho, z2 = ctx.saved_tensors  # read once: activation checkpointing refuses a second time
        asked = dict(zip(SCHEMA, map(bool, ctx.needs_input_grad), strict=True))
        found = backward(grad_o, o, z1, rho, z2, [asked[name] for name in DIFFERENTIABLE], *tensors, *ctx.switches)
        grads = dict(zip((name for name in DIFFERENTIABLE if asked[name]), found, strict=True))
        return tuple(grads.get(name) for name in SCHEMA)

    operator = torch.library.custom_op(
        f"hypermlp::{name}_forward", forward, mutates_args=(),
        schema=f"({signature(SCHEMA)}) -> (Tensor, Tensor, Tensor, Tensor)",
    )  # fmt: skip
    operator.register_fake(_fake_forward)
    operator.register_autograd(gradient, setup_context=_setup_context)
    registered = getattr(torch.ops.hypermlp, f"{name}_forward")
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _register_autocast(f"{name}_forward", registered, device_type, key)
    register_flop_formula(registered, get_raw=True)(_forward_flops)
    return operator


def _backward_operator(name: str) -> Any:
    """``hypermlp::<name>_backward`` with a fake, FLOPs, and a clear error for a second derivative.

    Its results are the gradients asked for, in the order of the inputs and in their dtypes.
    """

    def backward(
        grad_o: Tensor, o: Tensor, z1: Tensor, rho: Tensor, z2: Tensor, needs: Sequence[bool], *flat: Any
    ) -> list[Tensor]:
        x = OperatorArgs.unflatten(flat)
        with torch.autocast(x.q.device.type, enabled=False):
            grads = PATHS[name].backward(grad_o, Outputs(o, z1, rho, z2), x, Needs.of(needs))
        pairs = zip(grads.flat, x.tensors, strict=True)
        return [grad.to(y.dtype) for grad, y in pairs if grad is not None and y is not None]

    def double_backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"the {name} path of hyper_attention has first derivatives only: "
            "use backend='reference' to differentiate twice"
        )

    operator = torch.library.custom_op(
        f"hypermlp::{name}_backward", backward, mutates_args=(),
        schema=f"({signature(_OF_OUTPUTS | SCHEMA)}) -> Tensor[]",
    )  # fmt: skip
    operator.register_fake(_fake_backward)
    operator.register_autograd(double_backward)
    registered = getattr(torch.ops.hypermlp, f"{name}_backward")
    register_flop_formula(registered, get_raw=True)(_backward_flops)
    return registered


def _fake_forward(*flat: Any) -> Outputs:
    x = OperatorArgs.unflatten(flat)
    dtype = torch.promote_types(x.q.dtype, torch.float32)
    batch, length, num_maps, _ = x.q.shape
    heads, width = x.v.shape[2:]
    return Outputs(
        o=x.v.new_empty((batch, length, heads, width), dtype=dtype),
        z1=x.q.new_empty((batch, length, num_maps, x.routing_mix.rank), dtype=dtype),
        rho=x.q.new_empty((batch, length, heads), dtype=dtype),
        z2=x.q.new_empty((batch, length, heads, x.readout_mix.rank), dtype=dtype),
    )


def _fake_backward(
    grad_o: Tensor, o: Tensor, z1: Tensor, rho: Tensor, z2: Tensor, needs: Sequence[bool], *flat: Any
) -> list[Tensor]:
    tensors = OperatorArgs.unflatten(flat).tensors
    return [x.new_empty(x.shape) for x, need in zip(tensors, needs, strict=True) if need and x is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    num_tensors = sum(kind.startswith("Tensor") for kind in SCHEMA.values())  # which come first
    ctx.save_for_backward(*inputs[:num_tensors], *output)
    ctx.switches = inputs[num_tensors:]
    _, *statistics = output
    ctx.mark_non_differentiable(*statistics)
    ctx.set_materialize_grads(False)


def cast_for_autocast(x: OperatorArgs) -> OperatorArgs:
    """``x`` as autocast wants the inputs of a matrix product; float64 stays, as everywhere in autocast."""
    dtype = torch.get_autocast_dtype(x.q.device.type)
    return x.map_streams(lambda y: y if not y.is_floating_point() or y.dtype == torch.float64 else y.to(dtype))


def _register_autocast(name: str, operator: Any, device_type: str, key: str) -> None:
    def kernel(*flat: Any) -> Any:
        cast = cast_for_autocast(OperatorArgs.unflatten(flat))
        with torch.autocast(device_type, enabled=False):
            return operator(*cast.flatten())

    _LIBRARY.impl(name, kernel, key)  # type: ignore[no-untyped-call]


def _forward_flops(*flat: Any, out_val: Any = None) -> int:
    x = OperatorArgs.unflatten(flat)
    return forward_flops(_pairs(x), **_sizes(x))


def _backward_flops(*flat: Any, out_val: Any = None) -> int:
    x = OperatorArgs.unflatten(flat[len(_OF_OUTPUTS) :])
    return backward_flops(_pairs(x), **_sizes(x))


def _sizes(x: OperatorArgs) -> dict[str, Any]:
    return {
        "num_heads": x.v.shape[2],
        "num_maps": x.options.num_maps,
        "qk": x.q.shape[3],
        "v": x.v.shape[3],
        "ranks": (x.routing_mix.rank, x.readout_mix.rank),
    }


def _pairs(x: OperatorArgs) -> int:
    """Query-key pairs of all sequences; where bounds cannot be read, as many as there can be."""
    bounds = x.tokens.cu_seqlens
    readable = bounds is not None and values_readable(bounds, wait=True)
    places = bounds.tolist() if bounds is not None and readable else [0, x.k.shape[1]]
    causal, max_lag = x.options.causal, x.options.window
    return x.q.shape[0] * sum(
        visible_pairs(stop - start, causal=causal, max_lag=max_lag, past=min(max(x.past - start, 0), stop - start))
        for start, stop in pairwise(places)
    )
