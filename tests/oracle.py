"""The operator token by token: the definition as plain loops, sharing no code with the library."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers import Case


def oracle(case: Case, attention_mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """``o`` ``[B, T, H, V]``; differentiable, and slow enough to be read."""
    v = case.tensors["v"]
    batch, length, num_heads, _ = v.shape
    valid = torch.ones(batch, length, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    bounds = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
    rows = [[v[b, 0] * 0] * length for b in range(batch)]
    for b in range(batch):
        for lo, hi in itertools.pairwise(bounds):
            for i in range(lo, hi):
                if valid[b, i]:
                    heads = [_one_row(case, valid, b, i, h, lo, hi) for h in range(num_heads)]
                    rows[b][i] = torch.stack(heads)
    return torch.stack([torch.stack(row) for row in rows])


def _one_row(case: Case, valid: Tensor, b: int, i: int, h: int, lo: int, hi: int) -> Tensor:
    tensors, options = case.tensors, case.options
    num_heads = tensors["v"].shape[2]
    keys, rows = _keys_and_table_rows(case, valid, b, i, lo, hi)

    mixed = []
    for index in range(h, tensors["q"].shape[2], num_heads):
        s = tensors["k"][b, keys, index] @ tensors["q"][b, i, index]
        mixed.append(_mix(case, "routing", s, rows, b, i, index))
    g = mixed[0]
    a = F.relu(g) if options["selection"] == "relu" else torch.logaddexp(mixed[1], mixed[1] * 0) * F.relu(g)
    if options["norm"]:
        norm = g.pow(2).sum().sqrt() if bool(g.detach().norm() > options["eps"]) else options["eps"]
        a = a / norm
    return _mix(case, "readout", a, rows, b, i, h) @ tensors["v"][b, keys, h]


def _keys_and_table_rows(case: Case, valid: Tensor, b: int, i: int, lo: int, hi: int) -> tuple[list[int], list[int]]:
    """Keys that query ``i`` of the sequence ``lo:hi`` sees, and the table row that each takes."""
    if case.by_lag:
        lags = range(min(i - lo + 1, case.options["max_lag"] or i + 1))
        pairs = [(i - lag, lag) for lag in lags]
    else:
        first = next(j for j in range(lo, hi) if valid[b, j])
        last = i + 1 if case.options["causal"] else hi
        pairs = [(j, j - first) for j in range(first, last)]
    seen = [(j, row) for j, row in pairs if valid[b, j]]
    return [j for j, _ in seen], [row for _, row in seen]


def _mix(case: Case, name: str, x: Tensor, rows: list[int], b: int, i: int, head: int) -> Tensor:
    tensors = case.tensors
    y = x if case.options[f"{name}_identity"] else x * 0
    if f"{name}.diag" in tensors:
        y = y + x * tensors[f"{name}.diag"][head, rows]
    if f"{name}.down" in tensors:
        z = x @ tensors[f"{name}.down"][head, rows]
        if f"{name}.core" in tensors:
            z = z * tensors[f"{name}.core"][b, i, head]
        y = y + tensors[f"{name}.up"][head, rows] @ z
    return y
