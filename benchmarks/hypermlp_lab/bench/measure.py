"""Time and memory of one call, and the order in which calls of several providers alternate."""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Literal, TypeVar

import torch

Mode = Literal["forward", "forward+backward"]
MODES: tuple[Mode, ...] = ("forward", "forward+backward")

_MIN_ROUNDS = 3
_T = TypeVar("_T")


def interleaved(items: Sequence[_T], rounds: int) -> Iterator[list[_T]]:
    """Every item once a round, each round starting one further on.

    Drift of the machine then falls on all of them alike, and none always follows the same one.
    """
    for index in range(rounds if items else 0):
        start = index % len(items)
        yield [*items[start:], *items[:start]]


def rounds(timers: Mapping[str, Callable[[], float]], repeats: int, seconds: float) -> dict[str, list[float]]:
    """What each timer gave, called in turn for ``repeats`` rounds, fewer (but 3) after ``seconds``."""
    times: dict[str, list[float]] = {name: [] for name in timers}
    gc.collect()
    end = time.monotonic() + seconds
    for index, names in enumerate(interleaved(list(timers), repeats)):
        if index >= _MIN_ROUNDS and time.monotonic() > end:
            break
        for name in names:
            times[name].append(timers[name]())
    return times


def quartiles(times: list[float]) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return low, median, high


def wall_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call, with the device's queue empty before and after."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def extra_peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Most bytes allocated at any moment of ``call`` above those allocated at its start."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # The allocator's own record: exact, and the same in every run. Peak RSS also holds what malloc kept
    # from earlier calls and code pages touched for the first time, tens of MB here. Scratch that BLAS
    # takes for itself is not seen: it does not grow with T.
    with _native_stderr_hidden(), torch.autograd.profiler.profile(profile_memory=True) as profiler:
        call()
    results = profiler.kineto_results
    assert results is not None
    events = sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda event: event.start_ns())
    peak: int = max(accumulate((event.nbytes() for event in events), initial=0))
    return peak


@contextmanager
def _native_stderr_hidden() -> Iterator[None]:
    """Keep the profiler's start and stop lines, which PyTorch offers no way to switch off, out of the table."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def out_of_memory(error: RuntimeError) -> bool:
    # the CPU allocator has no exception of its own
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
