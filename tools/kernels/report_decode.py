"""The decoding kernels compiled ahead of time: what each takes. Part of ``make kernel-report``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from virtual_gpu import Resources, resources, virtual_gpu

from hypermlp_kernels.arguments import Options, SequenceMix
from hypermlp_kernels.launch_decode import decode

# the paper's widths at D = 1024 with two heads, in memory as caches hold it
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "decode glu bf16": {},
    "decode relu bf16": {"glu": False},
    "decode glu fp32": {"dtype": torch.float32},
    "decode glu bf16 slots last": {"slots_last": True},
    "decode static bf16": {"static": True},
    "decode position bf16": {"position": True},
}


class Step(NamedTuple):
    """One decoding call on zeros: ``older`` and ``newer`` tokens in a ring of ``capacity`` slots."""

    older: int = 1000
    newer: int = 0
    capacity: int = 1024
    glu: bool = True
    dtype: torch.dtype = torch.bfloat16
    slots_last: bool = False
    static: bool = False
    position: bool = False
    masked: bool = False
    batch: int = 1
    heads: int = 2
    width: int = 64
    values: int = 512
    rank: int = 16

    def run(self) -> None:
        maps = 2 * self.heads if self.glu else self.heads
        length = torch.tensor(self.older) if self.static else None
        masked = self.masked or self.static
        slots = self.capacity if self.static else self.older + self.newer
        decode(
            torch.zeros(self.batch, 1, maps, self.width, dtype=self.dtype),
            self._segments(maps, self.width),
            self._segments(self.heads, self.values),
            self._mix(maps),
            self._mix(self.heads),
            Options("glu" if self.glu else "relu", True, 1e-12, True, "position" if self.position else "lag", 4096),
            valid=torch.ones(self.batch, slots, dtype=torch.bool) if masked else None,
            start=torch.zeros(self.batch, dtype=torch.long) if self.position else None,
            length=length,
        )

    def _segments(self, heads: int, width: int) -> list[torch.Tensor]:
        if self.slots_last:
            memory = torch.zeros(self.batch, heads, width, self.capacity, dtype=self.dtype).mT
        else:
            memory = torch.zeros(self.batch, heads, self.capacity, width, dtype=self.dtype)
        if self.static:
            return [memory]
        if not self.newer:
            return [memory[:, :, : self.older]]
        return [memory[:, :, self.capacity - self.older :], memory[:, :, : self.newer]]

    def _mix(self, heads: int) -> SequenceMix:
        table = torch.zeros(heads, 4096, self.rank, dtype=self.dtype)
        gate = torch.zeros(self.batch, 1, heads, self.rank, dtype=self.dtype)
        return SequenceMix(table[..., 0].contiguous(), table, table, gate, True)


def report(arch: str, name: str) -> Iterator[Resources]:
    """Resources of a configuration's four kernels (NVIDIA)."""
    with virtual_gpu(arch) as gpu:
        Step(**CONFIGURATIONS[name]).run()
        for compiled in gpu.compiled():
            yield resources(compiled)
