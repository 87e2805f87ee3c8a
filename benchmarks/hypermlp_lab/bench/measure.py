"""Time and memory of one call, and the order in which calls of several providers alternate."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

Mode = Literal["forward", "forward+backward"]
MODES: tuple[Mode, ...] = ("forward", "forward+backward")

_T = TypeVar("_T")


class Contestant:
    """A layer with its input, ready to be called again and again without leaving anything behind."""

    def __init__(self, layer: nn.Module, hidden_states: Tensor) -> None:
        self.layer, self.hidden_states = layer, hidden_states.detach().requires_grad_()
        self.pull = torch.randn_like(hidden_states)

    def prepare(self) -> None:
        """Drop gradients, so that a call neither adds to old ones nor finds memory for new ones."""
        self.hidden_states.grad = None
        self.layer.zero_grad(set_to_none=True)

    def call(self, mode: Mode) -> None:
        """One call; the output is not kept. Forward alone is inference, without autograd."""
        if mode == "forward":
            with torch.no_grad():
                self.layer(self.hidden_states)
        else:
            self.layer(self.hidden_states).backward(self.pull)


def interleaved(items: Sequence[_T], rounds: int) -> Iterator[list[_T]]:
    """Every item once a round, each round starting one further on.

    Drift of the machine then falls on all of them alike, and none always follows the same one.
    """
    for index in range(rounds if items else 0):
        start = index % len(items)
        yield [*items[start:], *items[:start]]


def time_call(contestant: Contestant, mode: Mode) -> float:
    """Seconds of one call, with the device's queue empty before and after."""
    contestant.prepare()
    synchronize(contestant.hidden_states.device)
    start = time.perf_counter()
    contestant.call(mode)
    synchronize(contestant.hidden_states.device)
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
    changes = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    level = peak = 0
    for _, change in sorted(changes, key=itemgetter(0)):
        level += change
        peak = max(peak, level)
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
