"""Memory of one training run: its peak, and whether it can fit at all."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

import torch

from hypermlp.models import LanguageModelConfig
from hypermlp_lab.training.config import TrainingConfig
from hypermlp_lab.training.recipe import parameter_count

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# of a container
_LIMIT = Path("/sys/fs/cgroup/memory.max")
_FLOAT, _TOKEN = 4, 8


def check_memory(model: LanguageModelConfig, training: TrainingConfig, device: torch.device) -> None:
    """Refuse what cannot fit, before it is built.

    Raises:
        ValueError: weights, gradients, optimizer, batch and logits alone need more than ``device`` has.
    """
    tokens = training.batch_size * training.seq_len
    needed = 4 * parameter_count(model) * _FLOAT + tokens * (2 * _TOKEN + 2 * model.vocab_size * _FLOAT)
    there = total_memory(device)
    if there is not None and needed > there:
        raise ValueError(
            f"training needs more than {needed / 2**30:,.0f} GiB and {device} has {there / 2**30:,.0f}: "
            "give a smaller hidden_size, number of layers, max_lag or batch_size"
        )


def total_memory(device: torch.device) -> int | None:
    """Bytes that a program can have there; None where it cannot be known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return None
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(there, int(_LIMIT.read_text()))
    except (OSError, ValueError):  # no such file, or "max"
        return there


def reset_peak_memory(device: torch.device) -> None:
    """Start measuring afresh, where the platform can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        _CLEAR.write_text("5")  # resets VmHWM, see proc(5)


def peak_memory(device: torch.device) -> int | None:
    """Bytes: of tensors on a GPU, else the process's resident peak. None where it cannot be known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
