"""Quantised weights of a host as plain numbers, by the calls of the libraries that made them."""

from __future__ import annotations

import copy
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn


def with_plain_weights(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``module``, or where weights in it are quantised a copy of it to read, with plain ones and all else shared.

    What no library here can turn back stays as it is.

    Args:
        module: of a host model.
        dtype: of weights whose library does not say what they were.

    Raises:
        ValueError: a library cannot turn back what it made.
    """
    parts: dict[str, dict[str, Any]] = {"_parameters": {}, "_modules": {}}
    for name, parameter in module._parameters.items():
        weight = None if parameter is None or parameter.is_meta else _plain(module, name, parameter, dtype)
        if weight is not None:
            parts["_parameters"][name] = nn.Parameter(weight, requires_grad=False)
    for name, child in module._modules.items():
        if child is not None and (plain := with_plain_weights(child, dtype)) is not child:
            parts["_modules"][name] = plain
    if not any(parts.values()):
        return module
    made = copy.copy(module)
    for kind, changed in parts.items():
        made.__dict__[kind] = getattr(module, kind) | changed
    return made


def _plain(module: Any, name: str, weight: Any, dtype: torch.dtype) -> Tensor | None:
    """A quantised weight as plain numbers; None if it is not quantised, or nobody knows how."""
    kind = type(weight)
    try:
        if kind.__module__.startswith("bitsandbytes."):
            return _of_bitsandbytes(module, weight, dtype)
        if kind.dequantize is not Tensor.dequantize:  # torchao, optimum-quanto
            plain: Tensor = weight.dequantize()
            return plain
    except Exception as error:  # whatever another library raises
        raise ValueError(
            f"the weights of {type(module).__name__} are quantised, and {kind.__module__}.{kind.__qualname__} does not "
            f"turn back {name} ({type(error).__name__}: {error}): swap before quantising"
        ) from error
    return None


def _of_bitsandbytes(module: Any, weight: Any, dtype: torch.dtype) -> Tensor | None:
    functional = import_module("bitsandbytes.functional")
    if weight.dtype.is_floating_point:
        return None  # made, and not quantised before it is moved to a device
    if hasattr(weight, "quant_state"):
        plain: Tensor = functional.dequantize_4bit(weight.data, weight.quant_state)
        return plain
    # a first call moves the scales from the weight to its module
    scales = module.state.SCB if weight.SCB is None else weight.SCB
    whole: Tensor = functional.int8_vectorwise_dequant(weight.data, scales)
    return whole.to(dtype)
