"""Input-conditioned gates ``phi(x W + b)``: the diagonal cores of feature and sequence mixing.

The paper's ``L1(x)`` and ``L2(x)`` are projections with such a core: queries are gated after their
projection and rotation, the heads' output before its projection. The sequence mixings' low-rank
cores are of the same kind, so one product makes them all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from hypermlp.layers.projection import Projection, start_afresh


class Gates(NamedTuple):
    """One layer's gates for tokens ``[B, T]``; None where there is none (:attr:`HyperConfig.gate_widths`).

    Attributes:
        query: ``[B, T, qk_dim]``, multiplies the queries.
        output: ``[B, T, v_dim]``, multiplies the heads' output.
        routing: ``[B, T, S*H*R]``, core of the first sequence mixing.
        readout: ``[B, T, H*R]``, core of the second.
    """

    query: Tensor | None = None
    output: Tensor | None = None
    routing: Tensor | None = None
    readout: Tensor | None = None


class GateProjection(nn.Module):
    """``phi(x W + b)`` for all gates of a layer, with ``phi`` the sigmoid or the identity.

    Args:
        hidden_size: width of ``x``.
        widths: of each gate, in the order of :class:`Gates`; 0 for none.
        activation: ``"sigmoid"`` or ``"identity"``.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        hidden_size: int,
        widths: tuple[int, int, int, int],
        activation: str = "sigmoid",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.widths, self.activation = widths, activation
        self.proj = Projection(hidden_size, sum(widths), device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        start_afresh(self.proj)

    def forward(self, hidden_states: Tensor) -> Gates:
        x: Tensor = self.proj(hidden_states)
        if self.activation == "sigmoid":
            x = torch.sigmoid(x)
        gates = Gates(*x.split_with_sizes(self.widths, dim=-1))
        if all(self.widths):
            return gates
        return Gates(*[part if width else None for part, width in zip(gates, self.widths, strict=True)])

    def extra_repr(self) -> str:
        named = [f"{name}={width}" for name, width in zip(Gates._fields, self.widths, strict=True) if width]
        return ", ".join([*named, f"activation={self.activation!r}"])
