"""The native path: the C++ kernels of ``hypermlp_kernels.native`` as an operator of PyTorch, for CPUs.

Compiled on first use by the system's C++ compiler, and imported then. float32 is computed in float32; bfloat16 and
float16 are converted as they are read; float64 takes the same sources compiled for it.
"""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from hypermlp.ops import chunked, decode
from hypermlp.ops.arguments import Gradients, Needs, OperatorArgs, Outputs
from hypermlp.ops.decode import StepArgs
from hypermlp.ops.modes import values_readable
from hypermlp.ops.nonfinite import made_finite
from hypermlp.ops.varlen import segments

_logger = logging.getLogger("hypermlp")


def unavailable(q: Tensor) -> str | None:
    """Why the kernels cannot take ``q``, or None if they can. Builds them, the first time."""
    return _unavailable(q.device.type, q.dtype)


def _unavailable(device_type: str, dtype: torch.dtype) -> str | None:
    if device_type not in ("cpu", "meta"):
        return f"the kernels are for a CPU and the input is on {device_type}"
    if dtype.is_complex:
        return f"the kernels have no complex numbers, and the input is {dtype}"
    return _why_not_built(torch.promote_types(dtype, torch.float32))


# what torch.compiler.assume_constant_result sets; calling that would load the whole compiler with this module
_unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _why_not_built(dtype: torch.dtype) -> str | None:
    from hypermlp_kernels.native.build import UnavailableError, library

    try:
        library(dtype)
    except UnavailableError as error:
        _logger.info("the native path is not there: %s", error)
        return str(error)
    return None


def forward(x: OperatorArgs) -> Outputs:
    """The operator, as :func:`hypermlp.ops.chunked.forward`."""
    if unavailable(x.q) is not None:
        return chunked.forward(x)  # a program that was exported where there was a compiler
    from hypermlp_kernels.native import launch

    o, z1, rho, z2, nonfinite = launch.forward(
        x.q, x.k, x.v, x.routing_mix, x.readout_mix, x.options, segments(x.tokens, *x.k.shape[:2]), x.tokens.valid
    )
    if not nonfinite:
        return Outputs(o, z1, rho, z2)
    x, marked = made_finite(x)
    outputs = forward(x)
    outputs.o.masked_fill_(marked.unsqueeze(-1), float("nan"))
    return outputs


def backward(grad_o: Tensor, outputs: Outputs, x: OperatorArgs, needs: Needs) -> Gradients:
    """Its gradients; None where none was asked for."""
    if unavailable(x.q) is not None:
        return chunked.backward(grad_o, outputs, x, needs)
    from hypermlp_kernels.native import launch

    grads, nonfinite = launch.backward(
        grad_o, outputs.o, outputs.statistics, x.q, x.k, x.v, x.routing_mix, x.readout_mix, needs, x.options,
        segments(x.tokens, *x.k.shape[:2]), x.tokens.valid,
    )  # fmt: skip
    if not nonfinite:
        return grads
    x, marked = made_finite(x)
    grad_o, o = (y.masked_fill(marked.unsqueeze(-1), 0) for y in (grad_o, outputs.o))
    return backward(grad_o, outputs._replace(o=o), x, needs)


def short_conv() -> ModuleType:
    """The kernels of the short convolution."""
    from hypermlp_kernels.native import launch_conv

    return launch_conv


def decode_step(x: StepArgs) -> Tensor:
    """``o`` ``[B, H*V]`` of the newest token, as :func:`hypermlp.ops.decode.decode_step`; no gradient.

    A compiled graph takes PyTorch's own operators, as does whatever has no values to compute with.
    """
    q, past, routing_mix, readout_mix, options = x
    if not q.shape[0] or not values_readable(q, *past.keys, *past.values):
        return decode.decode_step(x)
    from hypermlp_kernels.native import launch_step

    return launch_step.step(
        q, past.keys, past.values, routing_mix, readout_mix, options,
        valid=past.valid, start=past.start, length=past.length,
    ).to(q.dtype)  # fmt: skip
