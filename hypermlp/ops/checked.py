"""What ``backend="auto"`` takes on a GPU: the kernels of a family that passed its self-check, else PyTorch's operators.

The choice is made where values are, when an operator runs: a compiled graph or an exported program makes it too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hypermlp.ops import chunked, decode, triton
from hypermlp.ops.arguments import Gradients, Needs, OperatorArgs, Outputs
from hypermlp.ops.decode import StepArgs
from hypermlp.ops.modes import captured, values_readable
from hypermlp.ops.self_check import trusted
from hypermlp.ops.self_check_cases import backward_errors, backward_family, forward_errors, forward_family
from hypermlp.ops.self_check_steps import Plain, conv_errors, conv_family, step_errors, step_family

NAME = "checked"
# the kind of device whose kernels are checked; tests put the interpreter's in its place
DEVICE_TYPE = "cuda"


def unavailable(q: Tensor) -> str | None:
    """Why there is nothing to check for an input like ``q``, or None if there is."""
    if q.device.type != DEVICE_TYPE:
        return f"only kernels on {DEVICE_TYPE} devices are checked and the input is on {q.device}"
    return triton.unavailable(q)


def forward(x: OperatorArgs) -> Outputs:
    """The operator, as :func:`hypermlp.ops.chunked.forward`."""
    # a block of rows after a cache is the chunked path's
    return chunked.forward(x) if x.past or not _forward_trusted(x) else triton.forward(x)


def backward(grad_o: Tensor, outputs: Outputs, x: OperatorArgs, needs: Needs) -> Gradients:
    """Its gradients; None where none was asked for."""
    if _forward_trusted(x):
        if trusted(backward_family(x, needs), lambda: backward_errors(x, needs)):
            return triton.backward(grad_o, outputs, x, needs)
        # the statistics that the kernels saved were not judged by themselves: nothing of theirs is relied on
        outputs = chunked.forward(x)
    return chunked.backward(grad_o, outputs, x, needs)


def _forward_trusted(x: OperatorArgs) -> bool:
    return unavailable(x.q) is None and trusted(forward_family(x), lambda: forward_errors(x))


def decode_step(x: StepArgs) -> Tensor:
    """``o`` ``[B, H*V]`` of the newest token, as :func:`hypermlp.ops.decode.decode_step`; no gradient."""
    return _step(x) if values_readable(x.q, wait=True) else triton.run_step(_operator, x)


def _step(x: StepArgs) -> Tensor:
    if x.q.shape[0] and unavailable(x.q) is None and trusted(step_family(x), lambda: step_errors(x)):
        return triton.decode_step(x)
    return decode.decode_step(x)


_operator = triton.step_operator("checked_decode", _step)


def takes_short_conv(x: Tensor, taps: Tensor, cu_seqlens: Tensor | None, past: int, plain: Plain) -> bool:
    """Whether to take the kernels of the short convolution: not in graphs, whose compiler fuses ``plain`` operators."""
    if not (values_readable(x, taps, wait=True) or captured(x.device)):
        return False
    graded = torch.is_grad_enabled()
    needs = (graded and x.requires_grad, graded and taps.requires_grad)
    packed = cu_seqlens is not None
    return trusted(
        conv_family(x, taps, packed, past, needs), lambda: conv_errors(x, taps, packed, past, needs, plain)
    )  # fmt: skip
