"""The paths: one entry each, and which of them an input takes."""

from __future__ import annotations

import torch
from torch import Tensor

from hypermlp.ops import checked, chunked, decode, native, triton
from hypermlp.ops.library import PATHS, Path, register
from hypermlp.ops.modes import needs_plain_operators

for _path in (
    Path("chunked", chunked.forward, chunked.backward, lambda q: None, decode.decode_step, takes_blocks=True),
    Path(
        "native", native.forward, native.backward, native.unavailable, native.decode_step,
        takes_blocks=True, short_conv=native.short_conv,
    ),
    Path(
        "triton", triton.forward, triton.backward, triton.unavailable, triton.decode_step,
        short_conv=triton.short_conv,
    ),
    Path(
        checked.NAME, checked.forward, checked.backward, checked.unavailable, checked.decode_step, takes_blocks=True,
    ),
):  # fmt: skip
    register(_path)


def choose(backend: str, x: Tensor) -> Path | None:
    """The path that takes an input like ``x``; None for PyTorch's own operators, which some modes need.

    Raises:
        ValueError: the path asked for cannot take it here.
    """
    if backend == "reference" or needs_plain_operators():
        return None
    if backend == "auto":
        if x.device.type == checked.DEVICE_TYPE and checked.unavailable(x) is None:
            return PATHS[checked.NAME]
        native_takes = x.device.type == "cpu" and x.dtype != torch.float64 and PATHS["native"].unavailable(x) is None
        return PATHS["native" if native_takes else "chunked"]
    path = PATHS[backend]
    reason = path.unavailable(x)
    if reason is not None:
        raise ValueError(f"backend={backend!r} cannot run here: {reason}; backend='auto' takes what can")
    return path
