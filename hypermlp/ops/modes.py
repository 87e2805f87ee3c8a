"""What may be done in the mode that PyTorch is in: read a tensor's values, call an operator of our own.

A call may be recorded, and run later or never on other values than it was recorded with. This is the one home of
such questions: nothing else asks whether it is being compiled before it reads.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _TorchDispatchModeKey

# modes that make a graph, or shapes without values, of all that is called
_RECORDING = (_TorchDispatchModeKey.FAKE, _TorchDispatchModeKey.PROXY, _TorchDispatchModeKey.FUNCTIONAL)


def values_readable(*tensors: Tensor, wait: bool = False) -> bool:
    """Whether Python may decide by what ``tensors`` hold.

    Not while the call is recorded (``torch.compile``, ``torch.export``, ``torch.jit.trace``, ``make_fx``, a CUDA
    graph), and not where there are no values or several (meta and fake tensors, ``torch.func`` transforms, tensors
    that are spread over processes). What cannot be read has to be right for any values.

    Args:
        tensors: what would be read.
        wait: whether those on an accelerator count too; Python then waits for them.
    """
    if torch.compiler.is_compiling() or traced():
        return False
    if torch._C._len_torch_dispatch_stack() and any(torch._C._get_dispatch_mode(key) for key in _RECORDING):
        return False
    return all(_has_values(x) and (x.device.type == "cpu" or (wait and not captured(x.device))) for x in tensors)


def _has_values(x: Tensor) -> bool:
    if x.is_meta or type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return False
    return not (torch._C._functorch.is_functorch_wrapped_tensor(x) or torch._is_functional_tensor(x))


def captured(device: torch.device) -> bool:
    """Whether what is launched on ``device`` is recorded by a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """``device`` as the current one, whose CUDA streams, events and graphs are meant where nobody says which."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def require(condition: Tensor, message: str) -> None:
    """ValueError where ``condition``, a bool of no dimensions, does not hold; a recorded call fails when it runs.

    Under ``vmap`` it must hold for every sample. What ``torch.jit.trace`` and ``torch.onnx.export`` write holds no
    such checks: the example is checked by the first, and nothing by the second.
    """
    while not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(condition):
        condition = torch._C._functorch.get_unwrapped(condition)
    if traced() or values_readable(condition, wait=True):
        if not bool(condition.all()):
            raise ValueError(message)
    elif not onnx_export():
        torch._assert_async(condition.all(), message)


def traced() -> bool:
    """Whether ``torch.jit.trace`` is recording."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def under_transform() -> bool:
    """Whether a ``torch.func`` transform or forward-mode differentiation is going on."""
    # PyTorch has no public way to ask: these are its own names, the same from 2.6 to 2.13
    return bool(torch._C._are_functorch_transforms_active()) or torch.autograd.forward_ad._current_level >= 0


def needs_plain_operators() -> bool:
    """Whether operators of our own would not do: they are opaque to transforms, and unknown to what runs a file.

    ``torch.jit.trace`` and ``torch.onnx.export`` write files that run without this library; ``torch.export`` and
    ``torch.compile`` keep its operators.
    """
    return under_transform() or traced() or onnx_export()


def context_parallel() -> bool:
    """Whether PyTorch's own ``context_parallel`` is going on: it puts a function in the place of SDPA's."""
    own = getattr(F.scaled_dot_product_attention, "__module__", None)
    return isinstance(own, str) and own.startswith("torch.distributed.")


# a constant of a graph, as it is made: the compiler does not look into what is no operator
context_parallel._dynamo_marked_constant = True  # type: ignore[attr-defined]


def onnx_export() -> bool:
    """Whether ``torch.onnx.export`` is recording."""
    # asked only then: the answer is in a part of PyTorch that takes time to import
    recording = traced() or torch.compiler.is_compiling()
    return recording and torch.onnx.is_in_onnx_export()


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on. Asking PyTorch is an error on devices that have none, such as meta."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """A region where autocast is off."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
