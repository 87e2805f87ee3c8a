"""The short convolution's kernels compiled ahead of time: what each takes. Part of ``make kernel-report``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from virtual_gpu import Resources, resources, virtual_gpu

from hypermlp_kernels import launch_short_conv

# four taps at D = 1024
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "conv bf16": {},
    "conv fp32": {"dtype": torch.float32},
    "conv autocast": {"taps_dtype": torch.float32},
    "conv packed bf16": {"packed": True},
    "conv past bf16": {"past": 3},
    "conv odd bf16": {"channels": 1023},
}


def call(
    length: int = 100, *, channels: int = 1024, size: int = 4, past: int = 0, packed: bool = False, batch: int = 2,
    dtype: torch.dtype = torch.bfloat16, taps_dtype: torch.dtype | None = None, **needs: bool,
) -> None:  # fmt: skip
    """One forward and backward on zeros."""
    x = torch.zeros(batch, past + length, channels, dtype=dtype)
    taps = torch.zeros(channels, size, dtype=taps_dtype or dtype)
    bounds = torch.zeros(length, dtype=torch.long) if packed else None
    y = launch_short_conv.forward(x, taps, past=past, starts=bounds)
    launch_short_conv.backward(y, x, taps, past=past, stops=bounds, **needs)


def report(arch: str, name: str) -> Iterator[Resources]:
    """Resources of a configuration's two kernels."""
    with virtual_gpu(arch) as gpu:
        call(**CONFIGURATIONS[name])
        for compiled in gpu.compiled():
            yield resources(compiled)
