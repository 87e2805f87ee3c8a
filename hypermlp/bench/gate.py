"""The correctness gate: a provider whose values or gradients are wrong is not timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hypermlp.bench.providers import Case, Provider, exact_copy
from hypermlp.layers import AttentionLayer

# several tiles of the chunked path, the last one short
GATE_LENGTH = 150

# relative error in the Euclidean norm, which one flipped ReLU in low precision does not decide
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Verdict:
    """What the gate found: relative errors against the float64 computation, or the exception met."""

    provider: str
    passed: bool
    output_error: float | None
    gradient_error: float | None
    worst_gradient: str | None
    tolerance: float
    reason: str | None = None


def check(provider: Provider, case: Case, *, length: int = GATE_LENGTH) -> Verdict:
    """Outputs and every gradient of a provider against its exact computation in float64.

    Args:
        provider: what to check.
        case: sizes, device and dtype of the measurement; its length is replaced.
        length: tokens to check over.
    """
    tolerance = _TOLERANCE[case.dtype]
    try:
        output_error, gradient_errors = _errors(provider, replace(case, length=length))
    except (RuntimeError, ValueError, TypeError) as error:
        return Verdict(provider.name, False, None, None, None, tolerance, f"{type(error).__name__}: {error}")
    worst = max(gradient_errors, key=lambda name: gradient_errors[name])
    # written so that a NaN fails
    passed = output_error <= tolerance and all(error <= tolerance for error in gradient_errors.values())
    reason = None if passed else f"relative error {output_error:.1e} in the output, {gradient_errors[worst]:.1e} in "
    reason = None if reason is None else f"{reason}the gradient of {worst}, where {tolerance:.0e} is allowed"
    return Verdict(provider.name, passed, output_error, gradient_errors[worst], worst, tolerance, reason)


def _errors(provider: Provider, case: Case) -> tuple[float, dict[str, float]]:
    layer = provider.build(case)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device=case.device, dtype=case.dtype)

    with torch.no_grad():
        # away from the start, where some tables are zero and could be ignored unnoticed
        for parameter in layer.parameters():
            parameter.add_(0.05 * draw(*parameter.shape))
    x, pull = (draw(case.batch, case.length, case.hidden_size) for _ in range(2))
    exact = exact_copy(layer)
    got = _value_and_gradients(layer, layer, x, pull)
    x, pull = x.double(), pull.double()
    want = _value_and_gradients(exact, lambda hidden_states: provider.exact(exact, hidden_states), x, pull)
    errors = {name: _relative_error(got[name], want[name]) for name in want}
    return errors.pop("output"), errors


def _value_and_gradients(
    layer: AttentionLayer, forward: Callable[[Tensor], Tensor], x: Tensor, pull: Tensor
) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    output = forward(x)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    gradients = torch.autograd.grad(output, (x, *parameters), pull)
    return {"output": output.detach(), **dict(zip(("hidden_states", *names), gradients, strict=True))}


def _relative_error(got: Tensor, want: Tensor) -> float:
    want = want.double()
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-300))
