"""Dynamic feature mixing: projections with an input-conditioned diagonal core.

The paper's ``L1(x)`` and ``L2(x)``. A gate is ``phi(x W + b)``; queries are gated after their
projection and rotation, the heads' output before its projection.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Gate(nn.Module):
    """``phi(x W + b)``, with ``phi`` the sigmoid or the identity."""

    def __init__(
        self,
        hidden_size: int,
        width: int,
        activation: str = "sigmoid",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.proj = nn.Linear(hidden_size, width, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        init_projection(self.proj)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x: Tensor = self.proj(hidden_states)
        return torch.sigmoid(x) if self.activation == "sigmoid" else x

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


def init_projection(linear: nn.Linear, gain: float = 1.0) -> None:
    """Weights ``N(0, gain^2 / fan_in)``, bias zero: a scale that does not depend on the width."""
    nn.init.normal_(linear.weight, std=gain * linear.in_features**-0.5)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
