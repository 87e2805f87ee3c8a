"""The one runner: gate, memory, then interleaved timing, into one plain report."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from hypermlp_lab.bench import gate
from hypermlp_lab.bench.environment import describe
from hypermlp_lab.bench.measure import MODES, Contestant, Mode, extra_peak_bytes, interleaved, time_call
from hypermlp_lab.bench.providers import Case, Provider, count_parameters

SCHEMA = 1
_MIN_ROUNDS = 3


@dataclass(frozen=True)
class Settings:
    """What a run measures.

    Attributes:
        lengths: tokens of each row.
        case: the other sizes, device and dtype.
        threads: CPU threads of PyTorch.
        repeats: most rounds of every length and mode.
        seconds: time after which a length and mode stops, once it has 3 rounds.
        memory_limit: bytes; a provider expected to need more is left out, and the report says so.
        seed: of parameters and inputs.
    """

    lengths: tuple[int, ...]
    case: Case
    threads: int = 1
    repeats: int = 20
    seconds: float = 10.0
    memory_limit: int = 3 << 30
    seed: int = 0


Log = Callable[[str], None]


def run(providers: Sequence[Provider], settings: Settings, log: Log = print) -> dict[str, Any]:
    """Check, then measure, every provider at every length.

    Returns:
        A report of plain values: ``settings``, ``environment``, ``providers``, ``gate`` (one
        verdict each) and ``rows``, one for each provider, length and mode. A row that was not
        measured has ``skipped``, which says why.
    """
    # before measuring: the checkout may move on meanwhile
    environment = describe(settings.case.device)
    with threads(settings.threads):
        torch.manual_seed(settings.seed)
        verdicts = [gate.check(provider, settings.case) for provider in providers]
        for verdict in verdicts:
            log(f"gate: {verdict.provider}: " + ("correct" if verdict.passed else f"FAILED, {verdict.reason}"))
        failed = {verdict.provider for verdict in verdicts if not verdict.passed}
        rows: list[dict[str, Any]] = []
        for length in settings.lengths:
            log(f"T = {length}")
            case = replace(settings.case, length=length)
            rows += _measure_length([p for p in providers if p.name not in failed], case, settings, log)
    add_ratios(rows, [provider.name for provider in providers if provider.baseline])
    return {
        "schema": SCHEMA,
        "benchmark": "attention",
        "settings": plain(settings),
        "environment": environment,
        "providers": {provider.name: provider.description for provider in providers},
        "gate": [asdict(verdict) for verdict in verdicts],
        "rows": rows,
    }


def passed(report: dict[str, Any]) -> bool:
    """Whether every provider was correct."""
    return all(verdict["passed"] for verdict in report["gate"])


def _measure_length(providers: Sequence[Provider], case: Case, settings: Settings, log: Log) -> list[dict[str, Any]]:
    contestants: dict[str, Contestant] = {}
    rows: list[dict[str, Any]] = []
    for provider in providers:
        needed = None if provider.peak_bytes is None else provider.peak_bytes(case)
        if needed is not None and needed > settings.memory_limit:
            reason = f"needs about {needed / 2**30:.1f} GiB, the limit is {settings.memory_limit / 2**30:.1f} GiB"
            log(f"  {provider.name}: skipped, {reason}")
            rows += [skipped_row(provider.name, case.length, mode, reason) for mode in MODES]
            continue
        shape = (case.batch, case.length, case.hidden_size)
        contestants[provider.name] = Contestant(provider.build(case), torch.randn(shape, **case.factory))
    for mode in MODES:
        # the call under the memory record also warms up this size
        peaks = {name: _peak(contestant, mode) for name, contestant in contestants.items()}
        times = _interleaved_times(
            {name: contestants[name] for name in peaks if peaks[name] is not None}, mode, settings
        )
        for name, peak in peaks.items():
            if peak is None:
                rows.append(skipped_row(name, case.length, mode, "out of memory"))
                continue
            parameters = count_parameters(contestants[name].layer)
            rows.append(_row(name, case, mode, parameters, peak, times[name]))
    order = [provider.name for provider in providers]
    return sorted(rows, key=lambda row: (MODES.index(row["mode"]), order.index(row["provider"])))


def _peak(contestant: Contestant, mode: Mode) -> int | None:
    """Extra memory of a call, None where there is not enough."""
    contestant.prepare()
    try:
        return extra_peak_bytes(partial(contestant.call, mode), contestant.hidden_states.device)
    except RuntimeError as error:
        if out_of_memory(error):
            return None
        raise
    finally:
        contestant.prepare()


def out_of_memory(error: RuntimeError) -> bool:
    # the CPU allocator has no exception of its own
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def _interleaved_times(contestants: dict[str, Contestant], mode: Mode, settings: Settings) -> dict[str, list[float]]:
    def timer(contestant: Contestant) -> float:
        seconds = time_call(contestant, mode)
        contestant.prepare()
        return seconds

    timers = {name: partial(timer, contestant) for name, contestant in contestants.items()}
    return rounds(timers, settings.repeats, settings.seconds)


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


def skipped_row(name: str, length: int, mode: str, reason: str) -> dict[str, Any]:
    return {"provider": name, "length": length, "mode": mode, "skipped": reason}


def _row(name: str, case: Case, mode: Mode, parameters: int, peak: int, times: list[float]) -> dict[str, Any]:
    low, median, high = quartiles(times)
    return {
        "provider": name,
        "length": case.length,
        "mode": mode,
        "parameters": parameters,
        "rounds": len(times),
        "median_ms": 1e3 * median,
        "quartiles_ms": [1e3 * low, 1e3 * high],
        "tokens_per_second": case.batch * case.length / median,
        "extra_peak_bytes": peak,
        "skipped": None,
    }


def quartiles(times: list[float]) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return low, median, high


def add_ratios(rows: list[dict[str, Any]], baselines: Sequence[str]) -> None:
    """Time of each row as a multiple of each baseline's, of the same length and mode."""
    measured = {(row["provider"], row["length"], row["mode"]): row for row in rows if row["skipped"] is None}
    for (_, length, mode), row in measured.items():
        others = {name: measured.get((name, length, mode)) for name in baselines}
        row["time_ratio"] = {
            name: row["median_ms"] / other["median_ms"] for name, other in others.items() if other is not None
        }


def plain(settings: Any) -> dict[str, Any]:
    plain: dict[str, Any] = asdict(settings)
    case: dict[str, Any] = plain.pop("case")
    del case["length"]
    plain |= case | {"dtype": str(settings.case.dtype).removeprefix("torch.")}
    return {name: list(x) if isinstance(x, tuple) else x for name, x in plain.items()}


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
