"""The parameters of one sequence mixing, as the operator takes them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SequenceMix(NamedTuple):
    """``Diag(identity + diag) + down Diag(gate_i) up^T`` along the sequence, for one token ``i``.

    The paper's ``R_j(x_t)`` (equation and storage in ``docs/mathematics.md``). Row 0 of a
    table belongs to lag 0, the token itself (or to position 0 in the position layout).

    Attributes:
        diag: ``[heads, L]``, the paper's ``p``; None for none.
        down: ``[heads, L, R]``, the paper's ``A``; given together with ``up``.
        up: ``[heads, L, R]``, the paper's ``B``.
        gate: ``[B, T, heads, R]``, the input-conditioned core ``c``; None for ones.
        identity: whether the identity is part of the map.
    """

    diag: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None
    gate: Tensor | None = None
    identity: bool = True
