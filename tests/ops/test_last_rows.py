"""Queries of the last tokens alone: on every path, the last rows of the whole, in values and in every gradient."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hypermlp.ops import hyper_attention
from hypermlp.ops.library import PATHS
from tests.helpers import BACKENDS, Case, assert_close, evaluate, make_case, tiles
from tests.oracle import oracle

LENGTH = 11
OF_QUERIES = ("q", "routing.core", "readout.core")
CASES: dict[str, dict[str, Any]] = {
    "glu": {},
    "window": {"max_lag": 4},
    "relu": {"selection": "relu", "norm": False, "readout": ("identity", "diag")},
    "position": {"layout": "position"},
    "bidirectional": {"causal": False},
}


def mask_of(batch: int) -> Tensor:
    mask = torch.ones(batch, LENGTH, dtype=torch.bool)
    mask[0, :3] = mask[-1, 5:7] = mask[-1, -1] = False
    return mask


PLACES: dict[str, dict[str, Tensor]] = {
    "whole rows": {},
    "masked": {"attention_mask": mask_of(2)},
    "packed": {"cu_seqlens": torch.tensor([1, 4, 4, 9, 10])},
    "packed and masked": {"cu_seqlens": torch.tensor([0, 4, LENGTH]), "attention_mask": mask_of(1)},
}


def last(case: Case, new: int) -> Case:
    return case.with_tensors({name: case.tensors[name][:, -new:] for name in OF_QUERIES if name in case.tensors})


def backends() -> list[str]:
    return [backend for backend in BACKENDS if backend != "triton"]


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", CASES)
def test_last_rows(name: str, place: str, backend: str) -> None:
    batch = 1 if "packed" in place else 2
    case = make_case(batch=batch, length=LENGTH, **CASES[name])
    for new in (7, 1):
        with tiles(2):
            found = evaluate(case, lambda c, new=new: last(c, new).run(backend, **PLACES[place]))
        expected = evaluate(case, lambda c, new=new: c.run("reference", **PLACES[place])[:, -new:])
        assert_close(found.named(), expected.named())


@pytest.mark.parametrize("backend", backends())
def test_last_rows_by_the_definition(backend: str) -> None:
    case = make_case(batch=2, length=LENGTH, max_lag=6)
    mask = mask_of(2)
    expected = oracle(case, mask)[:, -5:]
    assert_close({"o": last(case, 5).run(backend, attention_mask=mask)}, {"o": expected})


def test_numbers_that_are_not_finite_and_tokens_that_are_not_there() -> None:
    case = make_case(batch=2, length=LENGTH, max_lag=4)
    case.tensors["v"][0, 3] = torch.nan
    for backend in backends():
        assert torch.equal(last(case, 8).run(backend).isnan(), case.run("reference")[:, -8:].isnan())
        assert last(case, 8).run(backend).isnan().any()
        empty = case.with_tensors({n: case.tensors[n][:, :0] for n in OF_QUERIES})
        assert empty.run(backend).shape == (2, 0, *case.tensors["v"].shape[2:])


def test_what_does_not_fit_is_refused() -> None:
    q, k, v = (make_case(length=LENGTH).tensors[name] for name in "qkv")
    with pytest.raises(ValueError, match=r"q has 11 tokens and k 10: queries are of all tokens or of the last"):
        hyper_attention(q, k[:, 1:], v[:, 1:])
    with pytest.raises(ValueError, match=r"routing_mix.core must be \(1, 4, 4, 2\)"):
        make_case(length=LENGTH).with_tensors({"q": q[:, -4:]}).run("auto")
    with pytest.raises(ValueError, match=r"attention_mask must be \[batch, length\] = \(1, 11\)"):
        last(make_case(length=LENGTH), 4).run("auto", attention_mask=torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="a sequence of 11 tokens does not fit"):
        last(make_case(length=LENGTH, layout="position", max_lag=10), 4).run("auto")


def test_floating_point_operations() -> None:
    """Those of pairs alone: by sequence 1 + 2 + 3, and 1 + 2 + 3 + 5 * 4, of which the last rows have their part."""
    case = make_case(length=LENGTH, max_lag=4)
    bounds = torch.tensor([0, 3, LENGTH])

    def count(case: Case) -> int:
        with FlopCounterMode(display=False) as counter:
            evaluate(case, lambda c: c.run("chunked", cu_seqlens=bounds))
        return counter.get_total_flops()

    pairs = {n: count(last(case, n)) for n in (LENGTH, 6, 2)}
    one_pair = pairs[LENGTH] // 32
    assert pairs == {LENGTH: one_pair * 32, 6: one_pair * 23, 2: one_pair * 8}


def test_compiled_in_one_graph() -> None:
    case = last(make_case(length=LENGTH, max_lag=4), 5)
    compiled = torch.compile(hyper_attention, fullgraph=True, backend="aot_eager")
    found = evaluate(case, lambda c: c.run("chunked", compiled))
    assert_close(found.named(), evaluate(case, lambda c: c.run("chunked")).named())


def test_kernels_without_an_offset_of_queries_refuse_or_leave_it() -> None:
    """As on a GPU, where the Triton path could run: asked for it says so, ``"auto"`` takes another."""
    case = make_case(length=LENGTH)
    with mock.patch("hypermlp.ops.attention.choose", return_value=PATHS["triton"]):
        with pytest.raises(ValueError, match=r"backend='triton' takes a query for every key, and q has 4 of 11 tokens"):
            last(case, 4).run("triton")
        found = last(case, 4).run("auto")
    assert_close({"o": found}, {"o": case.run("reference")[:, -4:]})
