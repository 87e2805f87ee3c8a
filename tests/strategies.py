"""Hypothesis strategies: operator inputs with any switch, masks and packings."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers import FULL, Case, make_case

LENGTHS = (1, 2, 3, 15, 16, 17, 33, 65)


def parts() -> st.SearchStrategy[tuple[str, ...]]:
    """Any mixing that maps something to something."""
    subsets = st.lists(st.sampled_from(FULL), unique=True).map(tuple)
    return st.one_of(st.just(FULL), subsets.filter(lambda chosen: set(chosen) & {"identity", "diag", "low_rank"}))


@st.composite
def switches(draw: st.DrawFn) -> dict[str, Any]:
    causal, layout = draw(st.sampled_from([(True, None), (True, "lag"), (True, "position"), (False, None)]))
    return {
        "causal": causal,
        "layout": layout,
        "selection": draw(st.sampled_from(["glu", "relu"])),
        "norm": draw(st.booleans()),
        "routing": draw(parts()),
        "readout": draw(parts()),
    }


@st.composite
def cases(draw: st.DrawFn, lengths: tuple[int, ...] = LENGTHS, max_batch: int = 2, **fixed: Any) -> Case:
    chosen = draw(switches()) | fixed
    length = draw(st.sampled_from(lengths))
    by_lag = chosen["layout"] == "lag" or (chosen["layout"] is None and chosen["causal"])
    choices = {1, 2, length // 2 + 1, length, length + 3} if by_lag else {length, length + 3}
    width = st.integers(1, 5)
    return make_case(
        draw(st.integers(0, 1 << 16)),
        batch=draw(st.integers(1, max_batch)),
        length=length,
        heads=draw(st.integers(1, 3)),
        qk=draw(width),
        v=draw(width),
        ranks=(draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        max_lag=draw(st.sampled_from(sorted(choices))),
        **chosen,
    )


@st.composite
def visibility(draw: st.DrawFn, case: Case) -> dict[str, Tensor | None]:
    """``attention_mask`` (any pattern) and ``cu_seqlens`` (if there is one row), each or neither."""
    batch, length = case.tensors["q"].shape[:2]
    mask = cu_seqlens = None
    if draw(st.booleans()):
        generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 16)))
        mask = torch.rand(batch, length, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.8]))
    if batch == 1 and draw(st.booleans()):
        inside = draw(st.lists(st.integers(1, length - 1), unique=True, max_size=4)) if length > 1 else []
        cu_seqlens = torch.tensor([0, *sorted(inside), length])
    return {"attention_mask": mask, "cu_seqlens": cu_seqlens}
