"""One run of the decoding benchmark: gate, then interleaved timing, into one plain report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from hypermlp.cache import CacheSpec
from hypermlp_lab.bench.decoding import DecodeCase, DecodeProvider, Session, check
from hypermlp_lab.bench.environment import describe
from hypermlp_lab.bench.measure import synchronize
from hypermlp_lab.bench.providers import count_parameters
from hypermlp_lab.bench.runner import SCHEMA, Log, add_ratios, plain, quartiles, rounds, skipped_row, threads

MODE = "decode"


@dataclass(frozen=True)
class DecodeSettings:
    """What a run measures.

    Attributes:
        lengths: contexts, in tokens.
        case: the other sizes, device and dtype.
        threads: CPU threads of PyTorch.
        repeats: most rounds of every context.
        seconds: time after which a context stops, once it has 3 rounds.
        recompute_limit: longest context that is computed anew for every token.
        seed: of parameters and inputs.
    """

    lengths: tuple[int, ...]
    case: DecodeCase
    threads: int = 2
    repeats: int = 30
    seconds: float = 20.0
    recompute_limit: int = 4096
    seed: int = 0


def run(providers: Sequence[DecodeProvider], settings: DecodeSettings, log: Log = print) -> dict[str, Any]:
    """Check, then time, every provider at every context.

    Returns:
        A report of plain values like that of :func:`hypermlp_lab.bench.runner.run`, with one row for
        each provider and context.
    """
    shortest = min(settings.lengths, default=settings.case.steps + 1)
    if shortest <= settings.case.steps:
        raise ValueError(f"lengths must exceed the {settings.case.steps} tokens timed together, got {shortest}")
    with threads(settings.threads):
        torch.manual_seed(settings.seed)
        verdicts = [check(provider, settings.case) for provider in providers]
        for verdict in verdicts:
            log(f"gate: {verdict.provider}: " + ("correct" if verdict.passed else f"FAILED, {verdict.reason}"))
        correct = {verdict.provider for verdict in verdicts if verdict.passed}
        rows: list[dict[str, Any]] = []
        for length in settings.lengths:
            log(f"context {length}")
            case = replace(settings.case, length=length)
            rows += _measure([p for p in providers if p.name in correct], case, settings, log)
    add_ratios(rows, [provider.name for provider in providers if provider.baseline])
    return {
        "schema": SCHEMA,
        "benchmark": MODE,
        "settings": plain(settings),
        "environment": describe(settings.case.device),
        "providers": {provider.name: provider.description for provider in providers},
        "gate": [asdict(verdict) for verdict in verdicts],
        "rows": rows,
    }


def _measure(
    providers: Sequence[DecodeProvider], case: DecodeCase, settings: DecodeSettings, log: Log
) -> list[dict[str, Any]]:
    # every context compiles anew, and PyTorch keeps few compiled forms of one function
    torch.compiler.reset()
    sessions: dict[str, Session] = {}
    rows: list[dict[str, Any]] = []
    for provider in providers:
        if not provider.cached and case.length > settings.recompute_limit:
            reason = f"takes too long beyond {settings.recompute_limit} tokens (--recompute-limit)"
            log(f"  {provider.name}: skipped, {reason}")
            rows.append(skipped_row(provider.name, case.length, MODE, reason))
            continue
        x = torch.randn(case.batch, case.length, case.hidden_size, **case.factory)
        sessions[provider.name] = Session(
            provider.build(case), x, case.steps, cached=provider.cached, compiled=provider.compiled
        )
    for session in sessions.values():
        # memory grows, and kernels are compiled or chosen, in the first one
        _time(session)
    times = rounds(
        {name: partial(_time, session) for name, session in sessions.items()}, settings.repeats, settings.seconds
    )
    rows += [_row(name, case, session, times[name]) for name, session in sessions.items()]
    order = [provider.name for provider in providers]
    return sorted(rows, key=lambda row: order.index(row["provider"]))


def _time(session: Session) -> float:
    """Seconds per token."""
    device = session.hidden_states.device
    synchronize(device)
    start = time.perf_counter()
    session.decode()
    synchronize(device)
    seconds = time.perf_counter() - start
    session.rewind()
    return seconds / session.steps


def _row(name: str, case: DecodeCase, session: Session, times: list[float]) -> dict[str, Any]:
    low, median, high = quartiles(times)
    per_token, held = None, None
    if session.cache is not None:
        numbers = CacheSpec.of(session.layer.config).numbers_per_token
        per_token, held = numbers * session.hidden_states.itemsize, session.cache.nbytes
    return {
        "provider": name,
        "length": case.length,
        "mode": MODE,
        "parameters": count_parameters(session.layer),
        "rounds": len(times),
        "median_ms": 1e3 * median,
        "quartiles_ms": [1e3 * low, 1e3 * high],
        "cache_bytes_per_token": per_token,
        "cache_bytes": held,
        "skipped": None,
    }
