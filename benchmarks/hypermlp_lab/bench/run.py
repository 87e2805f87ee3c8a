"""The one run of every benchmark: gate, then for each case memory and interleaved timing, into one plain report."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Generic, NamedTuple

import torch

from hypermlp.ops.modes import on_device
from hypermlp_lab.bench.clock import clock_for
from hypermlp_lab.bench.environment import describe
from hypermlp_lab.bench.gate import Errors, Trials, check
from hypermlp_lab.bench.measure import out_of_memory, quartiles, rounds, threads
from hypermlp_lab.bench.settings import C, Case, P, Settings, present

SCHEMA = 2
Report = dict[str, Any]
Row = dict[str, Any]
Log = Callable[[str], None]


class SkipError(RuntimeError):
    """Why something is not measured at this size."""


class Prepared(NamedTuple):
    """A provider that has been called once at a size, so that it is ready to be timed.

    Attributes:
        seconds: times it once.
        figures: what else its row says, from the median in seconds.
    """

    seconds: Callable[[], float]
    figures: Callable[[float], dict[str, Any]]


class Benchmark(ABC, Generic[P, C]):
    """A comparison: what is compared, how each is checked, and how each is prepared for timing."""

    name: str
    timing = "wall clock"
    # whether any RuntimeError of one at a size leaves the others; without, only lack of memory does
    tolerant = False

    def __init__(self, providers: Sequence[P], settings: Settings[C]) -> None:
        self.providers, self.settings = providers, settings
        self.device = torch.device(settings.cases[0].device)
        self.clock = clock_for(self.device)

    def gate_cases(self) -> dict[str, C]:
        """Where every provider is checked first, by what is said of it."""
        return {f"T = {case.length}": case for case in self.settings.cases[0].at(*self.settings.gate_lengths)}

    @abstractmethod
    def errors(self, provider: P, case: C) -> Errors:
        """Of what a provider computes, against the same computed exactly."""

    def trials(self, provider: P) -> Trials:
        """Of the gate."""
        return {where: partial(self.errors, provider, case) for where, case in self.gate_cases().items()}

    @abstractmethod
    def prepare(self, provider: P, case: C, mode: str) -> Prepared:
        """Build and call it; raises :class:`SkipError` where it is not to be measured."""

    def modes(self, case: C) -> Sequence[str]:
        return self.settings.modes

    def begin(self, case: C) -> None:
        """What is done before any provider is prepared for a case."""

    def facts(self) -> dict[str, Any]:
        """What the report says besides."""
        return {}


def run(benchmark: Benchmark[P, C], log: Log = print, save: Callable[[Report], None] = lambda report: None) -> Report:
    """Check, then measure, every provider at every case.

    Args:
        benchmark: what to measure; a provider that needs another device is left out, with a note.
        log: takes lines for a reader.
        save: takes the report so far after every case, for a run that may be cut off.

    Returns:
        A report of plain values: ``settings``, ``environment``, ``timing``, ``providers``, ``gate`` (one
        verdict each) and ``rows``, one for each provider, case and mode. A row that was not
        measured has ``skipped``, which says why.
    """
    settings, start = benchmark.settings, time.monotonic()
    here = present(benchmark.providers, benchmark.device)
    for provider in benchmark.providers:
        if provider not in here:
            log(f"{provider.name}: left out, it needs {provider.device}")
    modes = list(dict.fromkeys(mode for case in settings.cases for mode in benchmark.modes(case)))
    with threads(settings.threads), on_device(benchmark.device):
        torch.manual_seed(settings.seed)
        report: Report = {
            "schema": SCHEMA,
            "benchmark": benchmark.name,
            "settings": settings.plain() | {"modes": modes},
            # before measuring: the checkout may move on meanwhile
            "environment": describe(settings.cases[0].device),
            "timing": benchmark.timing,
            "providers": {provider.name: provider.description for provider in here},
            **benchmark.facts(),
            "gate": [],
            "rows": [],
        }
        correct = []
        for provider in here:
            verdict = check(provider.name, benchmark.trials(provider))
            report["gate"].append(asdict(verdict))
            log(f"gate: {provider.name}: " + ("correct" if verdict.passed else f"FAILED, {verdict.reason}"))
            correct += [provider] if verdict.passed else []
        for case in settings.cases:
            benchmark.begin(case)
            for mode in benchmark.modes(case):
                log(f"T = {case.length}, {mode}")
                over = settings.total_seconds is not None and time.monotonic() - start > settings.total_seconds
                rows = (
                    [_skipped(provider.name, case, mode, "the run's time was over") for provider in correct]
                    if over
                    else _measure(benchmark, correct, case, mode, report["rows"])
                )
                for row in rows:
                    if row["skipped"] is not None:
                        log(f"  {row['provider']}: skipped, {row['skipped']}")
                report["rows"] += rows
            add_ratios(report["rows"], [provider.name for provider in here if provider.baseline])
            save(report)
    return report


def passed(report: Report) -> bool:
    """Whether every provider was correct."""
    return all(verdict["passed"] for verdict in report["gate"])


def _measure(
    benchmark: Benchmark[P, C], providers: Sequence[P], case: C, mode: str, earlier: Sequence[Row]
) -> list[Row]:
    """One row for each provider, all timed together."""
    prepared: dict[str, Prepared] = {}
    rows: dict[str, Row] = {}

    def skip(name: str, error: RuntimeError, when: str = "") -> None:
        known = isinstance(error, SkipError) or out_of_memory(error)
        if not known and not benchmark.tolerant:
            raise error
        reason = f"{type(error).__name__}: {str(error)[:300]}"
        reason = str(error) if isinstance(error, SkipError) else "out of memory" if known else reason
        rows[name] = _skipped(name, case, mode, when + reason)

    def prepare(provider: P) -> None:
        try:
            _check_limits(benchmark, provider, case, mode, earlier)
            prepared[provider.name] = benchmark.prepare(provider, case, mode)
        except RuntimeError as error:
            skip(provider.name, error)

    for provider in providers:
        prepare(provider)
    timers = {name: ready.seconds for name, ready in prepared.items()}
    try:
        for name, times in rounds(timers, benchmark.settings.repeats, benchmark.settings.seconds).items():
            low, median, high = quartiles(times)
            rows[name] = {
                "provider": name, "length": case.length, "mode": mode, "rounds": len(times),
                "median_ms": 1e3 * median, "quartiles_ms": [1e3 * low, 1e3 * high],
                **prepared[name].figures(median), "skipped": None,
            }  # fmt: skip
    except RuntimeError as error:
        for name in timers:
            skip(name, error, "while it was timed with the others: ")
    return [rows[provider.name] for provider in providers]


def _check_limits(benchmark: Benchmark[P, C], provider: P, case: C, mode: str, earlier: Sequence[Row]) -> None:
    settings = benchmark.settings
    if provider.peak_bytes is not None:
        needed, limit = provider.peak_bytes(case), settings.memory_limit
        limit = benchmark.clock.free_bytes() if limit is None else limit
        if limit is not None and needed > limit:
            raise SkipError(f"needs about {needed / 2**30:.1f} GiB, the limit is {limit / 2**30:.1f} GiB")
    # the time of the nearest shorter length that was measured grows at most with the square of the length
    shorter = [
        row for row in earlier
        if (row["provider"], row["mode"], row["skipped"]) == (provider.name, mode, None) and row["length"] < case.length
    ]  # fmt: skip
    if settings.longest_call is not None and shorter:
        nearest = max(shorter, key=lambda row: int(row["length"]))
        expected = 1e-3 * nearest["median_ms"] * (case.length / nearest["length"]) ** 2
        if expected > settings.longest_call:
            raise SkipError(f"expected to take {expected:.1f} s a call, from T = {nearest['length']}")


def _skipped(name: str, case: Case, mode: str, reason: str) -> Row:
    return {"provider": name, "length": case.length, "mode": mode, "skipped": reason}


def add_ratios(rows: Sequence[Row], baselines: Sequence[str]) -> None:
    """Time of each row as a multiple of each baseline's, of the same length and mode."""
    measured = {(row["provider"], row["length"], row["mode"]): row for row in rows if row["skipped"] is None}
    for (_, length, mode), row in measured.items():
        others = {name: measured.get((name, length, mode)) for name in baselines}
        row["time_ratio"] = {
            name: row["median_ms"] / other["median_ms"] for name, other in others.items() if other is not None
        }


def count_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def throughput(module: torch.nn.Module, case: Case, peak: int) -> Callable[[float], dict[str, Any]]:
    """Figures of layers and models, for :class:`Prepared`."""
    return lambda median: {
        "parameters": count_parameters(module),
        "tokens_per_second": case.batch * case.length / median,
        "extra_peak_bytes": peak,
    }
