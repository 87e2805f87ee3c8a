"""The correctness gate: a provider whose values or gradients are wrong is not timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# several tiles of the chunked path, the last one short
GATE_LENGTH = 150

# Allowed relative error in the Euclidean norm, on top of twice the error that the exact route makes
# when it runs in the precision measured: how much low precision costs differs between gradients.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
# more than this is no matter of precision
MOST_ROUNDING = 0.1

# by name, the output first: its relative error, and what is allowed
Errors = Mapping[str, tuple[float, float]]
Trials = Mapping[str, Callable[[], Errors]]


@dataclass(frozen=True)
class Verdict:
    """What the gate found.

    Attributes:
        provider: its name.
        passed: whether the output and every gradient are within what is allowed.
        output_error: relative error of the output; None if it raised.
        gradient_error: that of the gradient that comes closest to, or goes furthest beyond, what
            is allowed for it; ``worst_gradient`` is its name.
        reason: why it failed.
    """

    provider: str
    passed: bool
    output_error: float | None = None
    gradient_error: float | None = None
    worst_gradient: str | None = None
    reason: str | None = None


def check(name: str, trials: Trials) -> Verdict:
    """The verdict of the first trial that fails, or else of the last.

    Args:
        name: of the provider.
        trials: by where they are made (a length, a size), what computes the errors there.
    """
    verdict = Verdict(name, False, reason="it was not tried")
    for where, trial in trials.items():
        verdict = judge(name, trial)
        if not verdict.passed:
            return replace(verdict, reason=f"{where}: {verdict.reason}")
    return verdict


def judge(name: str, trial: Callable[[], Errors]) -> Verdict:
    """The verdict of one trial."""
    try:
        errors = trial()
    except Exception as error:  # whatever a kernel raises: this one gets no figure, the others do
        return Verdict(name, False, reason=f"{type(error).__name__}: {str(error)[:500]}")
    # written so that a NaN fails
    wrong = [
        f"{what}: relative error {error:.1e}, allowed {allowed:.1e}"
        for what, (error, allowed) in errors.items() if not error <= allowed
    ]  # fmt: skip
    output, *gradients = errors

    def excess(what: str) -> float:
        error, allowed = errors[what]
        return math.inf if math.isnan(error) else error / allowed

    worst = max(gradients, key=excess, default=None)
    gradient_error = None if worst is None else errors[worst][0]
    return Verdict(name, not wrong, errors[output][0], gradient_error, worst, "; ".join(wrong) or None)


def with_gradients(
    call: Callable[[Tensor], Tensor], module: torch.nn.Module, x: Tensor, pull: Tensor
) -> dict[str, Tensor]:
    """The output of ``call(x)`` and, for ``pull``, the gradients of ``x`` and of ``module``'s parameters, by name."""
    states = x.detach().requires_grad_()
    output = call(states)
    names, parameters = zip(*module.named_parameters(), strict=True)
    gradients = torch.autograd.grad(output, (states, *parameters), pull.to(output))
    return {"output": output.detach(), **dict(zip(("hidden_states", *names), gradients, strict=True))}


def compare(evaluate: Callable[[torch.dtype | None], Mapping[str, Tensor]], dtype: torch.dtype) -> Errors:
    """Errors against float64, by what the exact route loses in the precision measured.

    Args:
        evaluate: the output and gradients, by name: by the exact route in a dtype, or what is checked, for None.
        dtype: the precision measured.
    """
    want, rounded, got = (evaluate(route) for route in (torch.float64, dtype, None))

    def both(what: str) -> tuple[float, float]:
        rounding = relative_error(rounded[what], want[what])
        return relative_error(got[what], want[what]), TOLERANCE[dtype] + 2 * min(rounding, MOST_ROUNDING)

    return {what: both(what) for what in want}


def relative_error(got: Tensor, want: Tensor) -> float:
    want = want.double()
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-300))
