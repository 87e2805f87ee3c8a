"""Whose threads the kernels work on: PyTorch's, where it runs on OpenMP, else ones made for the call."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import lru_cache
from pathlib import Path

import torch

_LOADED_BY = os.getpid()
_FORKED_WITHOUT_EXEC = 0x40  # Linux: PF_FORKNOEXEC


def torchs_parallel() -> int | None:
    """The address of ``GOMP_parallel`` of PyTorch's own OpenMP; None where a call is to make its threads.

    A thread of OpenMP turns for milliseconds after its last work, to be there for the next: threads of another kind
    would share processors with it. What a fork leaves of OpenMP waits for threads that are gone, so a forked process
    makes its own.
    """
    return _address(os.getpid())


@lru_cache(maxsize=1)
def _address(process: int) -> int | None:
    if not sys.platform.startswith("linux") or _forked(process):
        return None
    if not torch.backends.openmp.is_available():  # type: ignore[no-untyped-call]
        return None
    # as PyTorch's libraries found it: the first there is among those that are open to all
    function = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    return None if function is None else ctypes.cast(function, ctypes.c_void_p).value


def _forked(process: int) -> bool:
    try:
        flags = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[6])
    except (OSError, ValueError, IndexError):
        return True  # who does not know takes threads that need nothing
    return process != _LOADED_BY or bool(flags & _FORKED_WITHOUT_EXEC)
