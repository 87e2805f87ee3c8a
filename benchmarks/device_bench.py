"""The benchmarks as :mod:`benchmarks.device_check` runs them: no command-line library, JSON and Markdown alone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hypermlp_lab.bench import decode_report, operator_report
from hypermlp_lab.bench import report as layer_report
from hypermlp_lab.bench.decode_runner import DecodeSettings
from hypermlp_lab.bench.decode_runner import run as run_decode
from hypermlp_lab.bench.decoding import DECODE_PROVIDERS, DECODE_PROVIDERS_ON_GPU, DecodeCase
from hypermlp_lab.bench.measure import MODES, Mode
from hypermlp_lab.bench.models import ModelCase, ModelSettings
from hypermlp_lab.bench.models import markdown as model_markdown
from hypermlp_lab.bench.models import run as run_models
from hypermlp_lab.bench.operator_runner import OperatorSettings
from hypermlp_lab.bench.operator_runner import run as run_operators
from hypermlp_lab.bench.operators import OPERATOR_PROVIDERS, OperatorCase
from hypermlp_lab.bench.providers import ATTENTION_PROVIDERS, LAYER_PROVIDERS_ON_GPU, Case
from hypermlp_lab.bench.runner import Settings, passed
from hypermlp_lab.bench.runner import run as run_layers

Report = dict[str, Any]
Measure = Callable[[str, float, Path], tuple[Report, str]]
# the length that the kernels were designed at comes first: time may run out
_LENGTHS = (4096, 1024, 16384, 8192, 32768, 2048)


def operators(modes: tuple[Mode, ...]) -> Measure:
    def measure(device: str, seconds: float, path: Path) -> tuple[Report, str]:
        small = device == "cpu"
        case = OperatorCase(1, 64 if small else 1024, 2, 1 if small else 4, device, _dtype(device))
        settings = OperatorSettings(
            (64, 32) if small else _LENGTHS, case, modes, gate_lengths=(150,) if small else (150, 1100),
            seconds=0.2 if small else 2.0, total_seconds=seconds,
        )  # fmt: skip
        report = run_operators(OPERATOR_PROVIDERS, settings, save=lambda report: layer_report.write_json(report, path))
        return report, operator_report.markdown(report)

    return measure


def decode(device: str, seconds: float, path: Path) -> tuple[Report, str]:
    small = device == "cpu"
    lengths = (64, 128) if small else (4096, 32768)
    case = DecodeCase(1, 64 if small else 1024, 2, 1, device, _dtype(device))
    share = seconds / (2 * len(lengths))
    providers = DECODE_PROVIDERS if small else DECODE_PROVIDERS_ON_GPU
    report = run_decode(providers, DecodeSettings(lengths, case, seconds=0.2 if small else min(4.0, share)))
    return report, decode_report.markdown(report)


def layers(device: str, seconds: float, path: Path) -> tuple[Report, str]:
    small = device == "cpu"
    lengths = (32, 64) if small else (1024, 4096, 16384)
    case = Case(1, 64 if small else 1024, 2, 1 if small else 4, device, _dtype(device))
    share = seconds / (2 * len(MODES) * len(lengths))
    providers = ATTENTION_PROVIDERS if small else LAYER_PROVIDERS_ON_GPU
    report = run_layers(
        providers, Settings(lengths, case, seconds=0.2 if small else min(3.0, share), memory_limit=40 << 30)
    )
    return report, layer_report.markdown(report)


def models(device: str, seconds: float, path: Path) -> tuple[Report, str]:
    if device == "cpu":
        cases: tuple[ModelCase, ...] = (ModelCase(48, 2, "demo", device, _dtype(device)),)
        providers = ["hyperglu-chunked", "softmax"]
    else:
        sizes = ((1024, 8), (4096, 2), (16384, 1))
        cases = (*(ModelCase(length, batch) for length, batch in sizes), ModelCase(512, 32, "demo"))
        providers = ["hyperglu-triton", "softmax"]
    # half for measuring, half for building and checking
    report = run_models(ModelSettings(cases, seconds=min(8.0, seconds / (2 * len(cases)))), providers)
    return report, model_markdown(report)


MEASURES: dict[str, Measure] = {
    "attention": operators(("forward",)),
    "training": operators(("forward+backward",)),
    "decode": decode,
    "layers": layers,
    "models": models,
}


def _dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def main(arguments: list[str] | None = None) -> int:
    """Status 1 where something failed its gate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=MEASURES)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--seconds", type=float, default=100.0, help="start nothing new after these")
    parser.add_argument("--device", default="cuda", help="cpu measures tiny sizes, to try the code itself")
    options = parser.parse_args(arguments)
    report, table = MEASURES[options.what](options.device, options.seconds, options.out)
    layer_report.write_json(report, options.out)
    print(table)
    return not passed(report)


if __name__ == "__main__":
    sys.exit(main())
