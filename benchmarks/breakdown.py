"""Where a layer's time goes, and what a second thread is worth: figures of docs/performance.md, in a minute.

    python benchmarks/breakdown.py

One run by PyTorch's profiler. The ratios to quote are those of ``make bench``, whose layers take turns.
"""

from __future__ import annotations

import argparse
from collections import Counter
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from hypermlp import HyperGLU, SoftmaxAttention

WIDTH, CALLS, ROUNDS = 256, 6, 9
_PROJECTIONS = ("aten::mm", "aten::addmm", "aten::bmm")


def layers(length: int) -> dict[str, nn.Module]:
    return {
        "HyperGLU": HyperGLU(WIDTH, num_heads=2, max_lag=length),
        "softmax": SoftmaxAttention(WIDTH, num_heads=2),
    }


def step(layer: nn.Module, x: Tensor, backward: bool) -> None:
    with torch.set_grad_enabled(backward):
        y = layer(x).sum()
        if backward:
            y.backward()


def part_of(operation: str) -> str:
    if "short_conv" in operation:
        return "convolutions"
    if "native_" in operation or "attention" in operation:
        return "operator"
    return "projections" if operation in _PROJECTIONS else "the rest"


def breakdown(layer: nn.Module, x: Tensor, backward: bool) -> dict[str, float]:
    """Milliseconds of a call, by what it was spent on."""
    step(layer, x, backward)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(CALLS):
            step(layer, x, backward)
    found: Counter[str] = Counter()
    for event in profiled.key_averages():
        found[part_of(event.key)] += event.self_cpu_time_total / 1e3 / CALLS
    return dict(found)


def gained_by_threads(layer: nn.Module, x: Tensor) -> float:
    """How many times as fast two threads are as one, forward and backward, in turn."""
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(ROUNDS):
        for threads, taken in seconds.items():
            torch.set_num_threads(threads)
            start = perf_counter()
            step(layer, x, backward=True)
            taken.append(perf_counter() - start)
    return median(seconds[1]) / median(seconds[2])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="512,2048,8192", help="tokens, separated by commas")
    lengths = [int(length) for length in parser.parse_args(arguments).lengths.split(",")]
    before = torch.get_num_threads()
    for length in lengths:
        x = torch.randn(1, length, WIDTH)
        for name, layer in layers(length).items():
            torch.set_num_threads(1)
            for mode, backward in (("forward", False), ("forward+backward", True)):
                parts = ", ".join(f"{part} {ms:.1f} ms" for part, ms in sorted(breakdown(layer, x, backward).items()))
                print(f"T = {length}, {name}, {mode}: {parts}", flush=True)
            print(f"T = {length}, {name}, two threads: {gained_by_threads(layer, x):.2f} x one")
    torch.set_num_threads(before)


if __name__ == "__main__":
    main()
