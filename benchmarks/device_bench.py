"""The benchmarks as :mod:`benchmarks.device_check` runs them: no command-line library, JSON and Markdown alone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hypermlp_lab.bench.decoding import DECODE_PROVIDERS, DECODE_PROVIDERS_ON_GPU, DecodeBenchmark, DecodeCase
from hypermlp_lab.bench.layers import ATTENTION_PROVIDERS, LAYER_PROVIDERS_ON_GPU, LayerBenchmark, LayerCase
from hypermlp_lab.bench.measure import MODES, Mode
from hypermlp_lab.bench.models import MODEL_PROVIDERS, ModelBenchmark, ModelCase
from hypermlp_lab.bench.operators import OPERATOR_PROVIDERS, OperatorBenchmark, OperatorCase
from hypermlp_lab.bench.results import markdown
from hypermlp_lab.bench.run import Benchmark, passed, run
from hypermlp_lab.bench.settings import Settings, present
from hypermlp_lab.training.files import write_json

# from the device and the seconds there are
Make = Callable[[str, float], Benchmark[Any, Any]]
_ROW = ("triton", "sdpa", "sdpa-flash", "sdpa-cudnn")
# the length that the kernels were designed at comes first: time may run out
_LENGTHS = (4096, 1024, 16384, 8192, 32768, 2048)


def operators(modes: tuple[Mode, ...], device: str, seconds: float) -> OperatorBenchmark:
    case = OperatorCase(device=device, dtype=_dtype(device))
    cases, gate_lengths, share = case.at(*_LENGTHS), (150, 1100), 2.0
    if device == "cpu":
        cases, gate_lengths, share = replace(case, hidden_size=64, batch=1).at(64, 32), (150,), 0.2
    settings = Settings(
        cases, modes, gate_lengths, repeats=50, seconds=share, longest_call=3.0, total_seconds=seconds
    )  # fmt: skip
    return OperatorBenchmark(OPERATOR_PROVIDERS, settings)


def row(device: str, seconds: float) -> OperatorBenchmark:
    """The kernels beside PyTorch's attention at the size that they were designed at."""
    benchmark = operators(MODES, device, seconds)
    first = replace(benchmark.settings, cases=benchmark.settings.cases[:1], gate_lengths=(150,), seconds=1.0)
    providers = [provider for provider in OPERATOR_PROVIDERS if provider.name in _ROW]
    return OperatorBenchmark(providers, first)


def decode(device: str, seconds: float) -> DecodeBenchmark:
    small = device == "cpu"
    case = DecodeCase(hidden_size=64 if small else 1024, device=device, dtype=_dtype(device))
    cases = case.at(*((64, 128) if small else (4096, 32768)))
    share = 0.2 if small else min(4.0, seconds / (2 * len(cases)))
    settings = Settings(cases, threads=2, repeats=30, seconds=share)
    return DecodeBenchmark(DECODE_PROVIDERS if small else DECODE_PROVIDERS_ON_GPU, settings)


def layers(device: str, seconds: float) -> LayerBenchmark:
    small = device == "cpu"
    sizes = {"hidden_size": 64, "batch": 1} if small else {"hidden_size": 1024, "batch": 4}
    case = LayerCase(**sizes, device=device, dtype=_dtype(device))
    cases = case.at(*((32, 64) if small else (1024, 4096, 16384)))
    share = 0.2 if small else min(3.0, seconds / (2 * len(MODES) * len(cases)))
    settings = Settings(cases, seconds=share, memory_limit=40 << 30)
    return LayerBenchmark(ATTENTION_PROVIDERS if small else LAYER_PROVIDERS_ON_GPU, settings)


def models(device: str, seconds: float) -> ModelBenchmark:
    small = device == "cpu"
    case = ModelCase(device=device, dtype=_dtype(device))
    sizes = (("gpt2", 1024, 8), ("gpt2", 4096, 2), ("gpt2", 16384, 1), ("demo", 512, 32))
    cases = tuple(
        replace(case, size=size, length=length, batch=batch)
        for size, length, batch in ((("demo", 48, 2),) if small else sizes)
    )
    # half for measuring, half for building and checking
    settings = Settings(cases, seconds=min(8.0, seconds / (2 * len(cases))))
    return ModelBenchmark(present(MODEL_PROVIDERS, torch.device(device)), settings)


BENCHMARKS: dict[str, Make] = {
    "attention": lambda device, seconds: operators(("forward",), device, seconds),
    "training": lambda device, seconds: operators(("forward+backward",), device, seconds),
    "row": row,
    "decode": decode,
    "layers": layers,
    "models": models,
}


def _dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def main(arguments: list[str] | None = None) -> int:
    """Status 1 where something failed its gate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=BENCHMARKS)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--seconds", type=float, default=100.0, help="start nothing new after these")
    parser.add_argument("--device", default="cuda", help="cpu measures tiny sizes, to try the code itself")
    options = parser.parse_args(arguments)
    benchmark = BENCHMARKS[options.what](options.device, options.seconds)
    # after every case, for a run that is cut off
    report = run(benchmark, save=lambda report: write_json(options.out, report, indent=1))
    print(markdown(report))
    return not passed(report)


if __name__ == "__main__":
    sys.exit(main())
