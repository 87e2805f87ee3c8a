"""Bit patterns of registers as numbers: a register of 32 bits or fewer is held as uint32, one of 64 as uint64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]
U32, U64, F32 = np.uint32, np.uint64, np.float32


def bits_of(kind: str) -> int:
    """Width of a PTX type such as ``b32``."""
    return int("".join(filter(str.isdigit, kind)))


def is_wide(kind: str) -> bool:
    return kind.endswith("64")


def integer(x: Array, kind: str) -> NDArray[np.int64] | NDArray[np.uint64]:
    """The number that the low bits mean: int64 for signed kinds, else uint64."""
    bits = bits_of(kind)
    wide = x.astype(U64)
    if bits < 64:
        wide = wide & U64((1 << bits) - 1)
    if kind[0] != "s":
        return wide
    shift = U64(64 - bits)
    return (wide << shift).view(np.int64) >> np.int64(64 - bits)


def pattern(x: Array, kind: str) -> Array:
    """The register that holds the low bits of an integer."""
    bits = bits_of(kind)
    wide = x.view(U64) if x.dtype == np.int64 else x.astype(U64)
    return wide if bits == 64 else (wide & U64((1 << bits) - 1)).astype(U32)


def float32(x: Array) -> NDArray[np.float32]:
    return np.ascontiguousarray(x.astype(U32)).view(F32)


def float32_pattern(x: Array) -> NDArray[np.uint32]:
    return np.ascontiguousarray(x.astype(F32)).view(U32)


def half(x: Array, kind: str) -> NDArray[np.float32]:
    """Low 16 bits as bfloat16 (``bf16``) or float16 (``f16``)."""
    low = x.astype(U32) & U32(0xFFFF)
    if kind.startswith("bf16"):
        return (low << U32(16)).view(F32)
    return low.astype(np.uint16).view(np.float16).astype(F32)


def half_pattern(x: NDArray[np.float32], kind: str) -> NDArray[np.uint32]:
    """Rounded to nearest even."""
    if kind.startswith("f16"):
        return x.astype(np.float16).view(np.uint16).astype(U32)
    bits = np.ascontiguousarray(x).view(U32).astype(U64)
    rounded = (bits + U64(0x7FFF) + ((bits >> U64(16)) & U64(1))) >> U64(16)
    return np.where(np.isnan(x), U32(0x7FFF), rounded.astype(U32))
