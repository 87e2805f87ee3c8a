"""A GPU in the emulator: inside :func:`emulated_gpu` kernels are compiled and launched as ever, and run on the CPU."""

from __future__ import annotations

import ctypes
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager
from virtual_gpu import _Driver

from emulator import arithmetic, matrices, transfers  # noqa: F401 - they fill the table of instructions
from emulator.machine import WARP, launch
from emulator.memory import GlobalMemory
from emulator.program import parse

__all__ = ["Launch", "emulated_gpu"]

MISTAKES = (
    "races", "operands overwritten in flight", "stores not fenced before wgmma", "copies nobody waited for",
)  # fmt: skip


class Launch(NamedTuple):
    """One kernel that ran, and what was counted while it did."""

    name: str
    found: Counter[str]

    @property
    def mistakes(self) -> dict[str, int]:
        """What must not happen, where it did."""
        return {what: self.found[what] for what in MISTAKES if self.found[what]}


class _EmulatingDriver(_Driver):
    def __init__(self, arch: str) -> None:
        super().__init__(arch)
        self.ran: list[Launch] = []

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        path = get_cache_manager(metadata.hash).get_file(f"{metadata.name}.ptx")
        if path is None:
            raise RuntimeError(f"Triton kept no PTX of {metadata.name}")
        program = parse(Path(path).read_text())

        def run(x: int, y: int, z: int, stream: Any, function: Any, *others: Any) -> None:
            names = source.fn.arg_names
            # after the launch's own arguments, the kernel's
            given = dict(zip(names, others[len(others) - len(names) :], strict=True))
            wanted = [given[name] for name in names if source.signature[name] != "constexpr"]
            memory, found = GlobalMemory(), Counter[str]()
            placed: dict[int, tuple[NDArray[np.uint8], int]] = {}
            arguments = [_place(value, memory, placed) for value in wanted]
            launch(program, memory, (x, y, z), metadata.num_warps * WARP, metadata.shared, arguments, found)
            for content, address in placed.values():
                content[:] = memory.data[address : address + content.size]
            self.ran.append(Launch(metadata.name, found))

        return run


def _place(value: Any, memory: GlobalMemory, placed: dict[int, tuple[NDArray[np.uint8], int]]) -> int | float:
    """The number, or the address of a copy of the tensor; tensors that share storage share the copy."""
    if not isinstance(value, torch.Tensor):
        return value
    storage = value.untyped_storage()
    start = storage.data_ptr()
    if start not in placed:
        size = max(1, storage.nbytes())
        content = np.zeros(1, np.uint8)
        if storage.nbytes():
            content = np.frombuffer((ctypes.c_uint8 * size).from_address(start), np.uint8)
        placed[start] = content, memory.allocate(content)
    return placed[start][1] + value.data_ptr() - start


@contextmanager
def emulated_gpu(arch: str) -> Iterator[list[Launch]]:
    """Make ``arch`` (``"sm_80"``, ``"sm_90"``) Triton's only device; gives the list that launches are added to."""
    before, device = driver._active, _EmulatingDriver(arch)
    _forget(arch)
    driver.set_active(device)
    try:
        yield device.ran
    finally:
        driver.set_active(before)
        _forget(arch)


def _forget(arch: str) -> None:
    """What was compiled for another driver under the same name keeps that driver's launcher."""
    for name, module in list(sys.modules.items()):
        if name.startswith("hypermlp_kernels"):
            for value in vars(module).values():
                if isinstance(value, triton.JITFunction):
                    value.device_caches.pop(arch, None)
