"""The C interface of the kernels: ``call.h`` in Python, field by field."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

_TYPES = {torch.bfloat16: 1, torch.float16: 2}  # 0: the precision of the computation


class Stream(ctypes.Structure):
    """A ``[B, T, heads, width]`` by its address and the distances between its elements."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("token", ctypes.c_int64),
        ("head", ctypes.c_int64),
    )


class Mix(ctypes.Structure):
    """Tables and gate of one sequence mixing."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("diag", "down", "up")),
        ("gate", Stream),
        ("rank", ctypes.c_int64),
        ("identity", ctypes.c_int64),
    )


class MixGrads(ctypes.Structure):
    """Where the gradients of a mixing go."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("diag", "down", "up", "gate"))


class Team(ctypes.Structure):
    """PyTorch's threads, see ``threads.py``: the address of what runs a function on all of them, and how many."""

    _fields_ = (("parallel", ctypes.c_void_p), ("threads", ctypes.c_int64))


class Call(ctypes.Structure):
    """Everything an entry reads and writes."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("length", "past", "heads", "maps", "qk", "v", "lags", "window")),
        *((name, ctypes.c_int64) for name in ("type", "norm", "causal", "by_lag", "threads")),
        ("eps", ctypes.c_double),
        ("sequences", ctypes.c_void_p),
        ("num_sequences", ctypes.c_int64),
        ("mask", ctypes.c_void_p),
        *((name, Stream) for name in ("q", "k", "values")),
        *((name, Mix) for name in ("routing", "readout")),
        *((name, ctypes.c_void_p) for name in ("o", "z1", "rho", "z2")),
        ("grad_o", Stream),
        *((name, ctypes.c_void_p) for name in ("dq", "dk", "dv")),
        *((name, MixGrads) for name in ("d_routing", "d_readout")),
        ("workspace", ctypes.c_void_p),
        ("team", Team),
        ("nonfinite", ctypes.c_int64),
    )


def type_code(dtype: torch.dtype) -> int:
    """How the kernels read a stream of this dtype."""
    return _TYPES.get(dtype, 0)


def stream(x: Tensor) -> Stream:
    """``x`` ``[B, T, heads, width]``, whose last dimension must lie side by side."""
    batch, token, head, _ = x.stride()
    return Stream(x.data_ptr(), batch, token, head)


class Segment(ctypes.Structure):
    """A cache's keys and values side by side: addresses, distances and the number of slots."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
        *((name, ctypes.c_int64) for name in ("key_head", "key_row", "key_slot", "value_head", "value_row", "count")),
    )


class StepCall(ctypes.Structure):
    """One token against a cache."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "heads", "maps", "qk", "v", "lags", "type", "norm", "threads")),
        ("eps", ctypes.c_double),
        ("segments", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_segments", "order", "length")),
        *((name, ctypes.c_void_p) for name in ("start", "valid")),
        ("q", Stream),
        *((name, Mix) for name in ("routing", "readout")),
        *((name, ctypes.c_void_p) for name in ("o", "workspace")),
        ("team", Team),
    )


class ConvCall(ctypes.Structure):
    """A short convolution, or its gradients."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("length", "past", "channels", "size", "threads", "batch", "type")),
        *((name, ctypes.c_void_p) for name in ("starts", "stops")),
        ("x", Stream),
        *((name, ctypes.c_void_p) for name in ("taps", "y")),
        ("grad_y", Stream),
        *((name, ctypes.c_void_p) for name in ("dx", "dtaps", "workspace")),
        ("team", Team),
    )
