"""The operator's arguments by name: what its callers, its paths and their kernels say to one another."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

_RENAMED = "SequenceMix.gate is called core now, in the constructor too: write core in its place"


class SequenceMix(NamedTuple):
    """``Diag(identity + diag) + down Diag(core_i) up^T`` along the sequence, for one token ``i``.

    The paper's ``R_j(x_t)`` (equation and storage in ``docs/mathematics.md``). Row 0 of a
    table belongs to lag 0, the token itself (or to position 0 in the position layout).

    Attributes:
        diag: ``[heads, L]``, the paper's ``p``; None for none.
        down: ``[heads, L, R]``, the paper's ``A``; given together with ``up``.
        up: ``[heads, L, R]``, the paper's ``B``.
        core: ``[B, T, heads, R]``, ``c`` of the paper, made from the token; None for ones.
        identity: whether the identity is part of the map.
    """

    diag: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None
    core: Tensor | None = None
    identity: bool = True

    @property
    def gate(self) -> Tensor | None:
        """Deprecated name of ``core``."""
        _warn_renamed()
        return self.core

    @property
    def rank(self) -> int:
        """Of the low-rank term; 0 for none."""
        return 0 if self.down is None else self.down.shape[-1]

    @property
    def tables(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What does not depend on the token."""
        return self.diag, self.down, self.up

    @property
    def tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """What may have a gradient, in the order of :class:`MixNeeds`."""
        return self.diag, self.down, self.up, self.core


def _warn_renamed() -> None:
    # a compiler's tracer knows no warnings
    if not torch.compiler.is_compiling():
        warnings.warn(_RENAMED, DeprecationWarning, stacklevel=3)


def _new_mix(
    cls: type[SequenceMix],
    diag: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    core: Tensor | None = None,
    identity: bool = True,
    *,
    gate: Tensor | None = None,
) -> SequenceMix:
    """A mixing, also under the name that its core had."""
    if gate is not None:
        _warn_renamed()
        if core is not None:
            raise TypeError("SequenceMix has one core: gate is its old name, give core alone")
        core = gate
    return tuple.__new__(cls, (diag, down, up, core, identity))


# not a subclass: PyTorch's trees take a named tuple apart, and a class that inherits from one whole
SequenceMix.__new__ = _new_mix  # type: ignore[method-assign,assignment]


class Options(NamedTuple):
    """What the operator computes, apart from its tensors: the switches of ``hyper_attention``."""

    selection: str
    norm: bool
    eps: float
    causal: bool
    layout: str
    max_lag: int | None

    @property
    def glu(self) -> bool:
        return self.selection == "glu"

    @property
    def num_maps(self) -> int:
        """Score maps of a head."""
        return 2 if self.glu else 1

    @property
    def by_lag(self) -> bool:
        return self.layout == "lag"

    @property
    def window(self) -> int | None:
        """Keys a query reaches back over, itself included; None for all."""
        return self.max_lag if self.by_lag else None


class Segment(NamedTuple):
    """Batch rows ``batch_start:batch_stop`` that hold one sequence each at ``start:stop``.

    ``has_holes``: there are masked tokens inside.
    """

    batch_start: int
    batch_stop: int
    start: int
    stop: int
    has_holes: bool


class MixNeeds(NamedTuple):
    """Which gradients of a mixing are asked for."""

    diag: bool
    down: bool
    up: bool
    core: bool

    @property
    def tables(self) -> bool:
        return self.diag or self.down or self.up


class Needs(NamedTuple):
    """Which gradients are asked for, and what has to be made for them."""

    q: bool
    k: bool
    v: bool
    routing: MixNeeds
    readout: MixNeeds

    @classmethod
    def of(cls, flat: Iterable[bool]) -> Needs:
        """From one bool for each tensor, in the order of :attr:`Gradients.flat`."""
        q, k, v, *mixes = flat
        fields = len(MixNeeds._fields)
        return cls(q, k, v, MixNeeds(*mixes[:fields]), MixNeeds(*mixes[fields:]))

    @property
    def scores(self) -> bool:
        """Something before the selection."""
        return self.q or self.k or any(self.routing)

    @property
    def weights(self) -> bool:
        """Something before the weights."""
        return self.scores or any(self.readout)

    @property
    def readout_statistic(self) -> bool:
        return self.scores or self.readout.down or self.readout.core

    @property
    def activated(self) -> bool:
        return self.v or self.readout.diag or self.readout.down


class MixGradients(NamedTuple):
    """Gradients of a mixing's tensors; None: not asked for."""

    diag: Tensor | None
    down: Tensor | None
    up: Tensor | None
    core: Tensor | None


class Gradients(NamedTuple):
    """Gradients of the operator's tensors; None: not asked for."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    routing: MixGradients
    readout: MixGradients

    @property
    def flat(self) -> tuple[Tensor | None, ...]:
        return (self.q, self.k, self.v, *self.routing, *self.readout)
