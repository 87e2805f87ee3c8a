"""The correctness gate: a provider whose values or gradients are wrong is not timed."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hypermlp.layers import AttentionLayer
from hypermlp_lab.bench.providers import Case, Provider

# several tiles of the chunked path, the last one short
GATE_LENGTH = 150

# Allowed relative error in the Euclidean norm, on top of twice the error that the exact route makes
# when it runs in the precision measured: how much low precision costs differs between gradients.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
# more than this is no matter of precision
MOST_ROUNDING = 0.1


@dataclass(frozen=True)
class Verdict:
    """What the gate found.

    Attributes:
        provider: its name.
        passed: whether the output and every gradient are within what is allowed.
        output_error: relative error of the output against float64; None if it raised.
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


def check(provider: Provider, case: Case, *, length: int = GATE_LENGTH) -> Verdict:
    """Outputs and every gradient of a provider against its exact computation in float64.

    Args:
        provider: what to check.
        case: sizes, device and dtype of the measurement; its length is replaced.
        length: tokens to check over.
    """
    try:
        errors, rounding = _errors(provider, replace(case, length=length))
    except (RuntimeError, ValueError, TypeError) as error:
        return Verdict(provider.name, False, reason=f"{type(error).__name__}: {error}")
    return judge(provider.name, errors, rounding, case.dtype)


def judge(name: str, errors: dict[str, float], rounding: dict[str, float], dtype: torch.dtype) -> Verdict:
    """The verdict over relative errors, by what the exact route loses in ``dtype``.

    Args:
        name: of the provider.
        errors: of ``"output"`` and of gradients, by name.
        rounding: what the exact route makes of each in ``dtype``.
        dtype: the precision measured.
    """
    allowed = {what: TOLERANCE[dtype] + 2 * min(rounding[what], MOST_ROUNDING) for what in errors}
    # written so that a NaN fails
    wrong = [what for what, error in errors.items() if not error <= allowed[what]]
    reason = "; ".join(f"{what}: relative error {errors[what]:.1e}, allowed {allowed[what]:.1e}" for what in wrong)
    gradients = [what for what in errors if what != "output"]
    if not gradients:
        return Verdict(name, not wrong, errors["output"], reason=reason or None)
    worst = max(gradients, key=lambda what: math.inf if math.isnan(errors[what]) else errors[what] / allowed[what])
    return Verdict(name, not wrong, errors["output"], errors[worst], worst, reason or None)


def _errors(provider: Provider, case: Case) -> tuple[dict[str, float], dict[str, float]]:
    """Relative errors of the layer, and of the exact route in the layer's precision, by name."""
    layer = provider.build(case)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device=case.device, dtype=case.dtype)

    randomise(layer, draw)
    x, pull = (draw(case.batch, case.length, case.hidden_size) for _ in range(2))

    def exact(dtype: torch.dtype) -> dict[str, Tensor]:
        copy = deepcopy(layer).to(dtype)
        return _value_and_gradients(copy, lambda states: provider.exact(copy, states), x.to(dtype), pull.to(dtype))

    want, rounded = exact(torch.float64), exact(case.dtype)
    got = _value_and_gradients(layer, layer, x, pull)
    return (
        {name: relative_error(got[name], want[name]) for name in want},
        {name: relative_error(rounded[name], want[name]) for name in want},
    )


def _value_and_gradients(
    layer: AttentionLayer, forward: Callable[[Tensor], Tensor], x: Tensor, pull: Tensor
) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    output = forward(x)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    gradients = torch.autograd.grad(output, (x, *parameters), pull)
    return {"output": output.detach(), **dict(zip(("hidden_states", *names), gradients, strict=True))}


@torch.no_grad()
def randomise(layer: AttentionLayer, draw: Callable[..., Tensor]) -> None:
    """Move parameters away from the start, where some tables are zero and could be ignored unnoticed."""
    for parameter in layer.parameters():
        parameter.add_(0.05 * draw(*parameter.shape))


def relative_error(got: Tensor, want: Tensor) -> float:
    want = want.double()
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-300))
