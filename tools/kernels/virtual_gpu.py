"""A GPU that compiles and does not run: kernels go through their real launch code for an architecture that is not here.

Inside :func:`virtual_gpu` Triton believes in one device of the given architecture. Tensors stay on the
CPU, every launch compiles as it would there, shared memory has that architecture's limit, and the launch
itself does nothing. What the limits of this are: outputs are not written, and nothing is timed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from hypermlp_kernels import (
    backward_keys,
    backward_maps,
    backward_parts,
    backward_rows,
    backward_tables,
    decode,
    norms,
    short_conv,
)
from hypermlp_kernels.readout import readout_kernel
from hypermlp_kernels.rows import routing_statistic_kernel, selection_statistics_kernel
from hypermlp_kernels.stored import stored_readout_kernel

KERNELS = (
    routing_statistic_kernel, selection_statistics_kernel, readout_kernel, stored_readout_kernel,
    norms.extreme_norms_kernel,
    backward_rows.weight_gradient_kernel, backward_rows.readout_statistic_gradient_kernel,
    backward_maps.map_gradient_kernel, backward_tables.table_gradient_kernel,
    backward_keys.turn_kernel, backward_keys.key_product_kernel, backward_parts.add_parts_kernel,
    decode.decode_scores_kernel, decode.decode_selection_kernel, decode.decode_readout_kernel, decode.decode_sum_kernel,
    short_conv.short_conv_kernel, short_conv.short_conv_backward_kernel,
)  # fmt: skip
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# bytes of shared memory that one block may use (CUDA programming guide, table of compute capabilities; AMD: LDS)
SHARED_MEMORY = {"sm_80": 166912, "sm_86": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
# of the longest loop's length: of such loops one kernel has several for the same work
_ALIKE = 0.4
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class _Utils:
    def __init__(self, arch: str) -> None:
        self._arch = arch

    def get_device_properties(self, device: str) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY[self._arch], "multiprocessor_count": 1}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: str) -> tuple[None, object, int, int, int]:
        # no module, which a compiled kernel would unload in the end
        return None, object(), 0, 0, 1024


class _Driver:
    """The part of Triton's driver interface that a launch uses."""

    def __init__(self, arch: str) -> None:
        self._arch = arch
        self.utils = _Utils(arch)
        self.launches: list[str] = []

    def get_current_device(self) -> str:
        return self._arch

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self._arch]

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *args: self.launches.append(metadata.name)


class VirtualGPU:
    """What was compiled and launched."""

    def __init__(self, arch: str, device: _Driver) -> None:
        self._arch, self._device = arch, device

    @property
    def launches(self) -> list[str]:
        """Names of the kernels launched, in order."""
        return self._device.launches

    def compiled(self) -> list[Any]:
        """Triton's compiled kernels, one for each specialization."""
        return [compiled for kernel in KERNELS for compiled in kernel.device_caches[self._arch][0].values()]


@contextmanager
def virtual_gpu(arch: str) -> Iterator[VirtualGPU]:
    """Make ``arch``, one of :data:`TARGETS`, Triton's only device; forgets what was compiled before."""
    before, device = driver._active, _Driver(arch)
    for kernel in KERNELS:
        kernel.device_caches.pop(arch, None)
    driver.set_active(device)
    try:
        yield VirtualGPU(arch, device)
    finally:
        driver.set_active(before)


class Resources(NamedTuple):
    """What a compiled kernel takes.

    ``loop`` counts the instructions of its main loop; ``seldom`` are those among them that few trips come to, a branch
    for tiles with hidden elements.
    """

    name: str
    registers: int
    stack: int
    shared: int
    instructions: int
    loop: Counter[str]
    seldom: int

    @property
    def within(self) -> int:
        """Instructions of a trip that takes no branch, as nearly all do."""
        return self.loop.total() - self.seldom

    @property
    def tensor_instructions(self) -> int:
        return sum(self.loop[op] for op in ("HGMMA", "HMMA", "UTCHMMA", "MFMA"))


class _Syntax(NamedTuple):
    """Of an assembler: a label, an instruction with its operands, and the label a branch names among them."""

    label: str
    instruction: str
    branches: tuple[str, ...]
    target: str


_SASS = _Syntax(
    r"\s*(\.L_x_\d+):", r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)(.*)", ("BRA",), r"`\((\.L_x_\d+)\)"
)
_GCN = _Syntax(r"(\.LBB\d+_\d+):", r"\t([a-z]\w+)(.*)", ("s_branch", "s_cbranch"), r"(\.LBB\d+_\d+)")


def resources(compiled: Any) -> Resources:
    """Of a compiled kernel, from its binary (NVIDIA) or assembly (AMD)."""
    name, shared = compiled.metadata.name, compiled.metadata.shared
    if "amdgcn" in compiled.asm:
        code = compiled.asm["amdgcn"]
        registers, stack = _numbers(code, r"\.vgpr_count:\s+(\d+)", r"\.private_segment_fixed_size:\s+(\d+)")
        found = _parse(code, _GCN)
        found = found._replace(loop=["MFMA" if op.startswith("v_mfma") else op for op in found.loop])
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = _tool("cuobjdump", "-res-usage", file.name)
            code = _tool("nvdisasm", "-c", file.name)
        registers, stack = _numbers(usage, r"REG:(\d+)", r"STACK:(\d+)")
        found = _parse(code, _SASS)
    return Resources(name, registers, stack, shared, len(found.opcodes), Counter(found.loop), found.seldom)


def _numbers(text: str, *patterns: str) -> list[int]:
    found = [re.search(pattern, text) for pattern in patterns]
    if None in found:
        raise RuntimeError(f"no resources in {text[:200]!r}")
    return [int(match[1]) for match in found if match]


def _tool(name: str, *args: str) -> str:
    done = subprocess.run([_TOOLS / name, *args], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


class _Code(NamedTuple):
    """All opcodes, those of the main loop, and how many of them a trip within leaves out."""

    opcodes: list[str]
    loop: list[str]
    seldom: int


def _parse(code: str, syntax: _Syntax) -> _Code:
    """From the labels, and the branches to them.

    Where a kernel walks its tiles in stretches it has several loops alike: the main one is the shortest of those not
    far from the longest, since tiles at the edges need more. What a branch in it jumps over is for few trips.
    """
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    for line in code.splitlines():
        if label := re.match(syntax.label, line):
            labels[label[1]] = len(opcodes)
        elif instruction := re.match(syntax.instruction, line):
            target = re.search(syntax.target, instruction[2])
            if instruction[1].startswith(syntax.branches) and target:
                jumps.append((len(opcodes), target[1]))
            opcodes.append(instruction[1])
    branches = [(at, labels[target]) for at, target in jumps if target in labels]
    # a branch to itself ends every kernel
    loops = [range(to, at + 1) for at, to in branches if to < at]
    longest = max(loops, key=len, default=range(0))
    apart = [x for x in loops if x == longest or x.stop <= longest.start or x.start >= longest.stop]
    main = min((x for x in apart if len(x) > _ALIKE * len(longest)), key=len, default=longest)
    seldom = {i for at, to in branches if at in main and at < to < main.stop for i in range(at + 1, to)}
    return _Code(opcodes, opcodes[main.start : main.stop], len(seldom))
