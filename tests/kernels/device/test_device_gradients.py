"""Gradients behind ``backend="triton"``, whatever makes them: every switch, long rows, the same bits every run."""

import sys

import pytest
import torch
from place import CASES, DTYPES, ON_GPU, Case, measure_of, operator_case

from hypermlp_kernels.backward_plan import Split
from tests.helpers import Case as OperatorCase
from tests.helpers import assert_close_to_reference, evaluate

NAMES = [name for name, case in CASES.items() if case.dtype == torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_lose_no_more_than_the_plain_equations(name: str, dtype: torch.dtype) -> None:
    case, hidden = operator_case(CASES[name], dtype)
    assert_close_to_reference(case, lambda c: c.run("triton", **hidden), measure_of(dtype), **hidden)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("selection", ["glu", "relu"])
def test_long_rows(selection: str, dtype: torch.dtype) -> None:
    long = Case(T=1100, H=2, K=64, V=192, R=(16, 16), rows=900, selection=selection)
    case, _ = operator_case(long if ON_GPU else Case(T=40, R=(16, 16), rows=30, selection=selection), dtype)
    assert_close_to_reference(case, lambda c: c.run("triton"), measure_of(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("selection", ["glu", "relu"])
def test_rows_in_parts(selection: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Split along keys wherever they are longer than a few tiles, as the plan does with longer ones."""
    monkeypatch.setattr(Split, "of", lambda tile, span: Split(3 if ON_GPU else 1, sys.maxsize))
    long = Case(T=700, H=2, K=64, V=192, R=(16, 16), rows=500, selection=selection)
    case, _ = operator_case(long if ON_GPU else Case(T=40, rows=30, selection=selection), dtype)
    assert_close_to_reference(case, lambda c: c.run("triton"), measure_of(dtype))
    assert_same_bits(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_same_bits_every_run(dtype: torch.dtype) -> None:
    sizes = {"T": 700, "B": 2, "H": 2, "K": 64, "V": 192, "R": (16, 16), "rows": 500} if ON_GPU else {"T": 20}
    case, _ = operator_case(Case(**sizes), dtype)
    assert_same_bits(case)


def assert_same_bits(case: OperatorCase) -> None:
    first = evaluate(case, lambda c: c.run("triton")).named()
    for _ in range(5 if ON_GPU else 1):
        again = evaluate(case, lambda c: c.run("triton")).named()
        moved = [name for name, x in first.items() if not torch.equal(x, again[name])]
        assert not moved, f"other bits in the second run: {moved}"
