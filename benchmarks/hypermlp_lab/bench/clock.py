"""How one call is timed on each kind of device. All that is particular to CUDA is here."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

from hypermlp_lab.bench.measure import wall_seconds

# of the second-level cache, where PyTorch does not tell its size
_CACHE_BYTES = 64 << 20
_WARM_UPS = 3


class HostClock:
    """Times calls on a CPU, by the wall clock."""

    how = "wall clock"

    def prepare(self, call: Callable[[], object], graph: bool) -> tuple[Callable[[], object], str]:
        """The call to time, warmed up, and how it is launched: ``"eager"`` or ``"graph"``."""
        call()
        return call, "eager"

    def seconds(self, call: Callable[[], object]) -> float:
        """Of one call."""
        return wall_seconds(call, torch.device("cpu"))

    def free_bytes(self) -> int | None:
        """Memory for tensors, once what nobody uses is given back; None where it is not limited."""
        return None


class CudaClock(HostClock):
    """Events around the call, on a device whose second-level cache holds none of its inputs."""

    how = "CUDA events, L2 flushed before every call"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or _CACHE_BYTES
        self._other_data = torch.empty(4 * cache, dtype=torch.uint8, device=device)

    def prepare(self, call: Callable[[], object], graph: bool) -> tuple[Callable[[], object], str]:
        """With ``graph``, the launches are recorded once and replayed, so that a short call is not timed idle."""
        if not graph:
            call()
            torch.cuda.synchronize(self._device)
            return call, "eager"
        # what a graph records must have run before, on a stream that is not the default
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                call()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        torch.cuda.synchronize(self._device)
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            call()
        return recorded.replay, "graph"

    def seconds(self, call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self._other_data.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3

    def free_bytes(self) -> int | None:
        gc.collect()
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self._device)[0])


def clock_for(device: torch.device) -> HostClock:
    return CudaClock(device) if device.type == "cuda" else HostClock()
