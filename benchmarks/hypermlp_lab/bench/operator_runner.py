"""One run of the operator benchmark: gate, ceilings, then memory and interleaved timing at every length."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hypermlp_lab.bench.clock import Clock, clock_for
from hypermlp_lab.bench.environment import describe
from hypermlp_lab.bench.gate import GATE_LENGTH, Verdict, judge, relative_error
from hypermlp_lab.bench.measure import MODES, Mode, extra_peak_bytes
from hypermlp_lab.bench.operators import Call, OperatorCase, OperatorProvider
from hypermlp_lab.bench.runner import (
    SCHEMA,
    Log,
    add_ratios,
    out_of_memory,
    plain,
    quartiles,
    rounds,
    skipped_row,
    threads,
)

Report = dict[str, Any]
_CEILING_ROUNDS = 30


@dataclass(frozen=True)
class OperatorSettings:
    """What a run measures.

    Attributes:
        lengths: tokens of each row, measured in this order.
        case: the other sizes, device and dtype.
        modes: ``"forward"``, ``"forward+backward"`` or both.
        gate_lengths: the lengths at which every operator is checked first.
        graph_length: the longest that is launched from a CUDA graph, where the operator allows it.
        repeats: most rounds of a length and mode.
        seconds: time after which a length and mode stops, once it has 3 rounds.
        longest_call: seconds; an operator expected to need more for one call is left out.
        total_seconds: time after which no length is started; None for no limit.
        memory_limit: bytes; an operator expected to need more is left out. None: what is free.
        threads: CPU threads of PyTorch.
        seed: of the inputs.
    """

    lengths: tuple[int, ...]
    case: OperatorCase
    modes: tuple[Mode, ...] = MODES
    gate_lengths: tuple[int, ...] = (GATE_LENGTH,)
    graph_length: int = 8192
    repeats: int = 50
    seconds: float = 4.0
    longest_call: float = 3.0
    total_seconds: float | None = None
    memory_limit: int | None = None
    threads: int = 1
    seed: int = 0


def run(
    providers: Sequence[OperatorProvider],
    settings: OperatorSettings,
    log: Log = print,
    save: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Check, then measure, every operator at every length.

    Args:
        providers: what to compare; one that needs another device is left out, with a note.
        settings: sizes and limits.
        log: takes lines for a reader.
        save: takes the report so far after every length, for a run that may be cut off.

    Returns:
        A report of plain values: ``settings``, ``environment``, ``providers``, ``ceilings``,
        ``gate`` and ``rows``, one for each provider, length and mode.
    """
    start = time.monotonic()
    here = torch.device(settings.case.device)
    present = [p for p in providers if p.device in (None, here.type)]
    for provider in providers:
        if provider not in present:
            log(f"{provider.name}: left out, it needs {provider.device}")
    with threads(settings.threads):
        torch.manual_seed(settings.seed)
        clock = clock_for(here)
        report: Report = {
            "schema": SCHEMA,
            "benchmark": "operators",
            "settings": plain(settings) | {"timing": clock.how},
            "environment": describe(settings.case.device),
            "providers": {provider.name: provider.description for provider in present},
            "ceilings": ceilings(clock, settings.case),
            "gate": [],
            "rows": [],
        }
        for provider in present:
            verdict = check(provider, settings)
            report["gate"].append(asdict(verdict))
            log(f"gate: {provider.name}: " + ("correct" if verdict.passed else f"FAILED, {verdict.reason}"))
        correct = {verdict["provider"] for verdict in report["gate"] if verdict["passed"]}
        for length in settings.lengths:
            case = replace(settings.case, length=length)
            chosen = [provider for provider in present if provider.name in correct]
            for mode in settings.modes:
                log(f"T = {length}, {mode}")
                over = settings.total_seconds is not None and time.monotonic() - start > settings.total_seconds
                report["rows"] += (
                    [skipped_row(p.name, length, mode, "the run's time was over") for p in chosen]
                    if over
                    else _Measurement(clock, case, mode, settings, report).rows(chosen)
                )
            add_ratios(report["rows"], [p.name for p in present if p.baseline])
            save(report)
    return report


def check(provider: OperatorProvider, settings: OperatorSettings) -> Verdict:
    """Output and, where a backward is measured, gradients against float64 by another route; the worst length."""
    gradients = settings.modes != ("forward",)
    verdict = Verdict(provider.name, False, reason="checked at no length")
    for length in settings.gate_lengths:
        case = replace(settings.case, length=length)
        try:
            errors, rounding = _errors(provider, case, gradients)
            verdict = judge(provider.name, errors, rounding, case.dtype)
        except Exception as error:  # whatever a kernel raises: the operator gets no figure, the others do
            verdict = Verdict(provider.name, False, reason=f"T = {length}: {type(error).__name__}: {str(error)[:500]}")
        if not verdict.passed:
            break
    return verdict


def _errors(
    provider: OperatorProvider, case: OperatorCase, gradients: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """Relative errors of the operator, and of the exact route in its precision, by name."""
    inputs = provider.inputs(case)

    def evaluate(call: Call, dtype: torch.dtype) -> dict[str, Tensor]:
        tensors = [x.detach().to(dtype).requires_grad_(gradients) for x in inputs]
        output = call(tensors)
        found = {"output": output.detach()}
        if gradients:
            pull = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
            grads = torch.autograd.grad(output, tensors, pull.to(case.dtype).to(output.dtype))
            found |= {f"gradient of input {index}": grad for index, grad in enumerate(grads)}
        return found

    with torch.set_grad_enabled(gradients):
        want, rounded = (evaluate(provider.exact, dtype) for dtype in (torch.float64, case.dtype))
        got = evaluate(provider.build(case), case.dtype)
    return (
        {name: relative_error(got[name], want[name]) for name in want},
        {name: relative_error(rounded[name], want[name]) for name in want},
    )


def ceilings(clock: Clock, case: OperatorCase) -> dict[str, Any]:
    """What this device does at best, measured in the same run: a large matrix product and a large copy."""
    on_gpu = torch.device(case.device).type == "cuda"
    size, count = (8192, 1 << 29) if on_gpu else (256, 1 << 20)
    a, b = (torch.randn(size, size, **case.factory) for _ in range(2))
    source = torch.randn(count, **case.factory)
    target = torch.empty_like(source)

    def best(call: Callable[[], object]) -> float:
        prepared, _ = clock.prepare(call, False)
        return quartiles([clock.seconds(prepared) for _ in range(_CEILING_ROUNDS)])[1]

    return {
        "matmul_size": size,
        "matmul_tflops": 2e-12 * size**3 / best(lambda: a @ b),
        "copy_gb_per_s": 2e-9 * source.nbytes / best(lambda: target.copy_(source)),
    }


@dataclass(frozen=True)
class _Measurement:
    """One length in one mode."""

    clock: Clock
    case: OperatorCase
    mode: Mode
    settings: OperatorSettings
    report: Report

    def rows(self, providers: Sequence[OperatorProvider]) -> list[dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        timers: dict[str, Callable[[], float]] = {}
        for provider in providers:
            try:
                reason = self._too_large(provider) or self._too_slow(provider)
                if reason is None:
                    timers[provider.name] = self._prepare(provider, found)
                    continue
            except RuntimeError as error:
                reason = _in_short(error)
            found[provider.name] = self._skipped(provider.name, reason)
        try:
            for name, times in rounds(timers, self.settings.repeats, self.settings.seconds).items():
                found[name] |= self._figures(found[name], times)
        except RuntimeError as error:
            found |= {
                name: self._skipped(name, f"while it was timed with the others: {_in_short(error)}") for name in timers
            }
        return [found[provider.name] for provider in providers]

    def _skipped(self, name: str, reason: str) -> dict[str, Any]:
        return skipped_row(name, self.case.length, self.mode, reason)

    def _too_large(self, provider: OperatorProvider) -> str | None:
        needed = None if provider.peak_bytes is None else provider.peak_bytes(self.case)
        free, limit = self.clock.free_bytes(), self.settings.memory_limit
        limit = free if limit is None else limit
        if needed is None or limit is None or needed <= limit:
            return None
        return f"needs about {needed / 2**30:.1f} GiB, the limit is {limit / 2**30:.1f} GiB"

    def _too_slow(self, provider: OperatorProvider) -> str | None:
        """Expected from the nearest shorter length that was measured, at the square of the length."""
        shorter = [
            row for row in self.report["rows"]
            if (row["provider"], row["mode"], row["skipped"]) == (provider.name, self.mode, None)
            and row["length"] < self.case.length
        ]  # fmt: skip
        if not shorter:
            return None
        nearest = max(shorter, key=lambda row: row["length"])
        expected = 1e-3 * nearest["median_ms"] * (self.case.length / nearest["length"]) ** 2
        if expected <= self.settings.longest_call:
            return None
        return f"expected to take {expected:.1f} s a call, from T = {nearest['length']}"

    def _prepare(self, provider: OperatorProvider, found: dict[str, dict[str, Any]]) -> Callable[[], float]:
        backward = self.mode != "forward"
        tensors = [x.requires_grad_(backward) for x in provider.inputs(self.case)]
        operator = provider.build(self.case)
        with torch.set_grad_enabled(backward):
            # compiled before memory is measured
            output = operator(tensors).detach()
        pull, output_bytes = torch.randn_like(output), output.nbytes
        del output

        def call() -> object:
            with torch.set_grad_enabled(backward):
                output = operator(tensors)
                return torch.autograd.grad(output, tensors, pull) if backward else output

        if backward:
            call()
        peak = extra_peak_bytes(call, pull.device)
        prepared, launched = self._launcher(call, provider.graph and self.case.length <= self.settings.graph_length)
        input_bytes = sum(x.nbytes for x in tensors)
        found[provider.name] = {
            "provider": provider.name, "length": self.case.length, "mode": self.mode,
            "flops": provider.flops(self.case, self.mode),
            # a backward reads inputs, output and its gradient again and writes the inputs' gradients
            "bytes": input_bytes + output_bytes + backward * (2 * input_bytes + 2 * output_bytes),
            "extra_peak_bytes": peak, "launched": launched, "skipped": None,
        }  # fmt: skip
        return partial(self.clock.seconds, prepared)

    def _launcher(self, call: Callable[[], object], graph: bool) -> tuple[Callable[[], object], str]:
        try:
            return self.clock.prepare(call, graph)
        except RuntimeError as error:
            if not graph:
                raise
            prepared, launched = self.clock.prepare(call, False)
            return prepared, f"{launched}, no graph: {_in_short(error)}"

    def _figures(self, row: dict[str, Any], times: list[float]) -> dict[str, Any]:
        low, median, high = quartiles(times)
        tflops = 1e-12 * row["flops"] / median
        return {
            "rounds": len(times),
            "median_ms": 1e3 * median,
            "quartiles_ms": [1e3 * low, 1e3 * high],
            "tflops": tflops,
            "matmul_share": tflops / self.report["ceilings"]["matmul_tflops"],
            "gb_per_s": 1e-9 * row["bytes"] / median,
        }


def _in_short(error: RuntimeError) -> str:
    return "out of memory" if out_of_memory(error) else f"{type(error).__name__}: {str(error)[:300]}"
