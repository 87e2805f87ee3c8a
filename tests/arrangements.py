"""Sequences padded or packed together, and the test that each gives what it gives alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from hypermlp.ops import hyper_attention
from tests.helpers import STREAMS, Case, Evaluated, assert_close, evaluate


class Arrangement(NamedTuple):
    """Where the tokens of each sequence stand in a ``[batch, length]`` grid."""

    batch: int
    length: int
    slots: list[tuple[int, int]]  # row, first position
    lengths: list[int]
    masked: bool
    cu_seqlens: Tensor | None = None

    @classmethod
    def padded(cls, lengths: list[int], left: list[int], length: int) -> Arrangement:
        """A row each, ``left[n]`` padded tokens before it and the rest after."""
        return cls(len(lengths), length, list(enumerate(left)), lengths, True)

    @classmethod
    def packed(cls, lengths: list[int], room: list[int] | None = None) -> Arrangement:
        """One row; ``room[n]`` padded tokens follow sequence ``n`` within its own bounds."""
        spans = [n + extra for n, extra in zip(lengths, room or [0] * len(lengths), strict=True)]
        bounds = torch.tensor([0, *spans], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        slots = [(0, int(start)) for start in bounds[:-1]]
        return cls(1, sum(spans), slots, lengths, room is not None, bounds)

    @property
    def mask(self) -> Tensor:
        mask = torch.zeros(self.batch, self.length, dtype=torch.bool)
        for n in range(len(self.lengths)):
            self.part(mask, n).fill_(True)
        return mask

    def part(self, x: Tensor, n: int) -> Tensor:
        (row, start), count = self.slots[n], self.lengths[n]
        return x[row, start : start + count]

    def place(self, sequences: Iterable[Tensor], junk: float) -> Tensor:
        """``[batch, length, ...]`` of sequences ``[1, n, ...]``; ``junk`` elsewhere, random if 1."""
        sequences = list(sequences)
        shape = (self.batch, self.length, *sequences[0].shape[2:])
        grid = torch.randn(shape, dtype=sequences[0].dtype) * junk if junk == 1 else sequences[0].new_full(shape, junk)
        for n, x in enumerate(sequences):
            self.part(grid, n).copy_(x[0])
        return grid


Evaluate = Callable[[dict[str, Tensor], Tensor | None, Tensor | None], Evaluated]


def assert_same_as_alone(
    evaluate: Evaluate,
    sequences: list[dict[str, Tensor]],
    arrangement: Arrangement,
    junk: float = 1,
    rtol: float = 1e-9,
) -> None:
    """Sequences padded or packed together give what each gives alone, gradients included.

    Args:
        evaluate: from streams ``[B, T, ...]`` (the weight of the output among them), mask and
            ``cu_seqlens``.
        sequences: the streams of each, ``[1, n, ...]``.
        arrangement: how they stand together.
        junk: what padded tokens hold; 1 for random values.
        rtol: see :func:`assert_close`.
    """
    alone = [evaluate(sequence, None, None) for sequence in sequences]
    streams = {name: arrangement.place((s[name] for s in sequences), junk) for name in sequences[0]}
    mask = arrangement.mask if arrangement.masked else None
    together = evaluate(streams, mask, arrangement.cu_seqlens)
    along = {"output": together.output} | together.streams
    for n, one in enumerate(alone):
        found = {name: arrangement.part(x, n) for name, x in along.items()}
        assert_close(found, {"output": one.output[0]} | {name: x[0] for name, x in one.streams.items()}, rtol)
    assert_close(together.shared, {n: sum(one.shared[n] for one in alone) for n in together.shared}, rtol)
    for name, x in along.items():
        assert not x[~arrangement.mask].any(), f"{name} is not zero at padded tokens"


def operator_evaluate(case: Case, backend: str, op: Callable[..., Tensor] = hyper_attention) -> Evaluate:
    """The operator over given streams, tables from ``case``."""

    def run(streams: dict[str, Tensor], attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> Evaluated:
        weight = streams["weight"]
        changed = case.with_tensors({name: x for name, x in streams.items() if name != "weight"})
        return evaluate(
            changed, lambda c: c.run(backend, op, attention_mask=attention_mask, cu_seqlens=cu_seqlens), weight
        )

    return run


def sequences_of(case: Case, lengths: list[int]) -> list[dict[str, Tensor]]:
    """The first tokens of ``case``'s batch rows as sequences of their own, with a weight."""
    weight = torch.randn(case.tensors["v"].shape, dtype=case.tensors["v"].dtype)
    streams = {name: x for name, x in case.tensors.items() if name in STREAMS} | {"weight": weight}
    return [{name: x[n : n + 1, :count] for name, x in streams.items()} for n, count in enumerate(lengths)]
