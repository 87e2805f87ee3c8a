"""Training throughput of whole language models: HyperGLU against softmax attention at equal parameters.

One step is forward, backward and AdamW, with parameters in float32 and products in the dtype of the case.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from hypermlp.budget import match_intermediate_size
from hypermlp.config import HyperConfig
from hypermlp.layers import AttentionLayer
from hypermlp.models import LanguageModel, LanguageModelConfig
from hypermlp.ops.attention import Backend
from hypermlp_lab.bench.clock import clock_for
from hypermlp_lab.bench.environment import describe
from hypermlp_lab.bench.gate import Verdict
from hypermlp_lab.bench.measure import extra_peak_bytes
from hypermlp_lab.bench.report import header, markdown_tables, table_rows
from hypermlp_lab.bench.runner import SCHEMA, Log, add_ratios, out_of_memory, quartiles, rounds, skipped_row

Size = Literal["demo", "gpt2"]
_GATE_LENGTH, _GATE_BATCH = 128, 2
# of the loss, by which low precision moves it a little in a deep model
_LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class ModelCase:
    """One model size and sequence length.

    Attributes:
        length: tokens of a sequence, and ``max_lag``.
        batch: sequences of a step.
        size: ``"demo"``, the byte model of ``make demo``, or ``"gpt2"``, of about 124M parameters.
        device, dtype: where, and the dtype of products.
    """

    length: int
    batch: int
    size: Size = "gpt2"
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        return f"{self.size}, {self.batch} x {self.length} tokens"

    def configs(self) -> dict[str, LanguageModelConfig]:
        """HyperGLU with 2 heads, and softmax with its MLP widened to the same number of parameters."""
        vocab, hidden, layers, heads, inner = {
            "demo": (256, 128, 4, 4, 352),
            # a SwiGLU of 2048 has the parameters of GPT-2's MLP of 3072
            "gpt2": (50257, 768, 12, 12, 2048),
        }[self.size]
        hyper = HyperConfig(hidden, 2, max_lag=self.length)
        softmax = HyperConfig(hidden, heads, mixer="softmax", rope=True)
        width = match_intermediate_size(hyper, softmax, inner).intermediate_size
        return {
            "hyperglu": LanguageModelConfig(vocab, hidden, layers, hyper, inner),
            "softmax": LanguageModelConfig(vocab, hidden, layers, softmax, width),  # type: ignore[arg-type]
        }


# name: mixer, path of the operator
PROVIDERS: Mapping[str, tuple[str, Backend]] = {
    "hyperglu-triton": ("hyperglu", "triton"),
    "hyperglu-chunked": ("hyperglu", "chunked"),
    "softmax": ("softmax", "auto"),
}


class TrainingStep:
    """A model with its optimiser and one batch of random tokens."""

    def __init__(self, case: ModelCase, provider: str) -> None:
        mixer, backend = PROVIDERS[provider]
        self.case = case
        torch.manual_seed(0)
        self.model = LanguageModel(case.configs()[mixer], backend=backend, device=case.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.tokens = torch.randint(self.model.config.vocab_size, (case.batch, case.length + 1), device=case.device)

    def loss(self) -> Tensor:
        device_type = torch.device(self.case.device).type
        with torch.autocast(device_type, self.case.dtype, enabled=self.case.dtype != torch.float32):
            return self.model.loss(self.tokens[:, :-1], self.tokens[:, 1:])

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


def check(case: ModelCase, provider: str) -> Verdict:
    """The loss and the gradient's norm of a small batch against the dense reference path in float32."""
    small = replace(case, length=min(case.length, _GATE_LENGTH), batch=_GATE_BATCH)
    name = f"{provider} ({case.size})"
    try:
        step = TrainingStep(small, provider)
        got = _loss_and_gradient(step)
        exact = TrainingStep(replace(small, dtype=torch.float32), provider)
        for module in exact.model.modules():
            if isinstance(module, AttentionLayer):
                module.backend = "reference"
        want = _loss_and_gradient(exact)
    except (RuntimeError, ValueError, TypeError) as error:
        return Verdict(name, False, reason=f"{type(error).__name__}: {error}")
    errors = [abs(a - b) / abs(b) for a, b in zip(got, want, strict=True)]
    allowed = _LOSS_TOLERANCE[case.dtype]
    # written so that a NaN fails
    passed = errors[0] <= allowed and errors[1] <= 5 * allowed
    reason = None if passed else f"relative errors of loss and gradient norm {errors}, allowed {allowed} and 5 times it"
    return Verdict(name, passed, errors[0], errors[1], "norm of all", reason)


def _loss_and_gradient(step: TrainingStep) -> tuple[float, float]:
    loss = step.loss()
    loss.backward()  # type: ignore[no-untyped-call]
    squares = [p.grad.double().square().sum() for p in step.model.parameters() if p.grad is not None]
    return float(loss.detach()), float(torch.stack(squares).sum().sqrt())


@dataclass(frozen=True)
class ModelSettings:
    """What a run measures: most ``repeats`` of each case, fewer (but 3) after ``seconds``."""

    cases: tuple[ModelCase, ...]
    repeats: int = 20
    seconds: float = 8.0


def run(settings: ModelSettings, providers: Sequence[str] = tuple(PROVIDERS), log: Log = print) -> dict[str, Any]:
    """Check, then time, every provider on every case; a report like that of :func:`hypermlp_lab.bench.runner.run`."""
    environment = describe(settings.cases[0].device)
    rows: list[dict[str, Any]] = []
    verdicts: dict[str, Verdict] = {}
    for case in settings.cases:
        log(case.name)
        for provider in providers:
            key = f"{provider} ({case.size})"
            if key not in verdicts:
                verdicts[key] = check(case, provider)
                log(f"  gate: {key}: {'correct' if verdicts[key].passed else 'FAILED, ' + str(verdicts[key].reason)}")
        rows += _measure(case, [p for p in providers if verdicts[f"{p} ({case.size})"].passed], settings)
    add_ratios(rows, ["softmax"])
    first = settings.cases[0]
    return {
        "schema": SCHEMA,
        "benchmark": "models",
        "settings": {
            "cases": [_plain(case) for case in settings.cases], "repeats": settings.repeats,
            "seconds": settings.seconds, "dtype": str(first.dtype).removeprefix("torch."), "device": first.device,
            "threads": torch.get_num_threads(),
        },
        "environment": environment,
        "providers": {name: f"{mixer}, backend {backend}" for name, (mixer, backend) in PROVIDERS.items()},
        "gate": [asdict(verdict) for verdict in verdicts.values()],
        "rows": rows,
    }  # fmt: skip


def _plain(case: ModelCase) -> dict[str, Any]:
    return {"size": case.size, "batch": case.batch, "length": case.length}


def _prepared(case: ModelCase, provider: str) -> tuple[TrainingStep, int] | None:
    """A step that has run once, and its extra peak memory; None where there is not enough."""
    try:
        step = TrainingStep(case, provider)
        step()  # the optimiser makes its state in the first one
        return step, extra_peak_bytes(step, torch.device(case.device))
    except RuntimeError as error:
        if out_of_memory(error):
            return None
        raise


def _measure(case: ModelCase, providers: Sequence[str], settings: ModelSettings) -> list[dict[str, Any]]:
    clock = clock_for(torch.device(case.device))
    prepared = {provider: _prepared(case, provider) for provider in providers}
    steps = {name: found for name, found in prepared.items() if found is not None}
    rows = [
        skipped_row(name, case.length, case.name, "out of memory") for name, found in prepared.items() if found is None
    ]
    times = rounds(
        {name: partial(clock.seconds, step) for name, (step, _) in steps.items()}, settings.repeats, settings.seconds
    )
    for name, (step, peak) in steps.items():
        low, median, high = quartiles(times[name])
        rows.append(
            {
                "provider": name, "length": case.length, "mode": case.name,
                "parameters": step.model.num_parameters(), "rounds": len(times[name]),
                "median_ms": 1e3 * median, "quartiles_ms": [1e3 * low, 1e3 * high],
                "tokens_per_second": case.batch * case.length / median, "extra_peak_bytes": peak,
                "skipped": None,
            }
        )  # fmt: skip
    return rows


def markdown(report: dict[str, Any]) -> str:
    """One table for each case."""
    modes = list(dict.fromkeys(row["mode"] for row in report["rows"]))
    return markdown_tables(report, {mode: (header(report), table_rows(report, mode)) for mode in modes})
