"""Whose threads the kernels work on: PyTorch's, where it runs on OpenMP, else ones made for the call."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path

import torch

_FORKED_WITHOUT_EXEC = 0x40  # Linux: PF_FORKNOEXEC


def torchs_parallel() -> int | None:
    """The address of ``GOMP_parallel`` of PyTorch's own OpenMP; None where a call is to make its threads.

    A thread of OpenMP turns for milliseconds after its last work, to be there for the next: threads of another kind
    would share processors with it. What a fork leaves of OpenMP waits for threads that are gone, so a forked process
    makes its own.
    """
    return _address()


@cache
def _address() -> int | None:
    if not sys.platform.startswith("linux") or _forked():
        return None
    if not torch.backends.openmp.is_available():  # type: ignore[no-untyped-call]
        return None
    # as PyTorch's libraries found it: the first there is among those that are open to all
    function = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    return None if function is None else ctypes.cast(function, ctypes.c_void_p).value


def _forked() -> bool:
    """Whether this process was forked, perhaps before this module was there; also where nobody says."""
    try:
        flags = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[6])
    except (OSError, ValueError, IndexError):
        return True
    return not flags or bool(flags & _FORKED_WITHOUT_EXEC)  # a kernel that is not Linux's may leave them zero


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_address.cache_clear)
