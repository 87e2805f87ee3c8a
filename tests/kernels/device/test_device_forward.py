"""The forward kernels: the interpreter's cases in every precision, all lengths, long rows, the same bits every run."""

import pytest
import torch
from place import CASES, DEVICE, DTYPES, ON_GPU, TOLERANCE, Case, error, moved, operator_case

from tests.helpers import assert_forward_close_to_reference, make_case

NAMES = [name for name, case in CASES.items() if case.dtype == torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_loses_no_more_than_the_plain_equations(name: str, dtype: torch.dtype) -> None:
    case, hidden = operator_case(CASES[name], dtype)
    assert_forward_close_to_reference(case, lambda c: c.run("triton", **hidden), **hidden)
    # z1, rho and z2, as the backward will read them
    raw = moved(CASES[name], dtype)
    for statistic, expected in zip(raw.kernels()[1:], raw.statistics(), strict=True):
        assert statistic.shape == expected.shape
        assert error(statistic, expected) < 2 * TOLERANCE[dtype]


def test_float16_rows_may_outgrow_float16() -> None:
    case = moved(CASES["float16-overflow"], torch.float16)
    assert error(case.kernels()[0], case.reference()) < 2 * TOLERANCE[torch.float16]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("selection", ["glu", "relu"])
def test_every_length_up_to_65(selection: str, dtype: torch.dtype) -> None:
    whole = make_case(length=65, batch=2, heads=1, qk=16, v=20, ranks=(4, 16), selection=selection, dtype=dtype)
    for length in range(1, 66) if ON_GPU else (1, 2, 17):
        cut = {n: x[:, :length] if n in {"q", "k", "v"} or "core" in n else x for n, x in whole.tensors.items()}
        case = whole.with_tensors(cut).map(lambda x: x.to(DEVICE))
        assert_forward_close_to_reference(case, lambda c: c.run("triton"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("selection", ["glu", "relu"])
def test_long_rows(selection: str, dtype: torch.dtype) -> None:
    """The paper's widths at a hidden size of 1024, with a window shorter than the sequence."""
    long = Case(T=1500, B=2, H=2, K=64, V=512, R=(16, 16), rows=1100, selection=selection)
    case, _ = operator_case(long if ON_GPU else Case(T=40, R=(16, 16), rows=30, selection=selection), dtype)
    assert_forward_close_to_reference(case, lambda c: c.run("triton"))


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_float32_products_follow_the_matmul_precision(precision: str) -> None:
    """With "high" PyTorch's own products are tf32 as well: the yardstick moves with it."""
    case, _ = operator_case(Case(T=200 if ON_GPU else 40, K=32, V=64, R=(16, 8)), torch.float32)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert_forward_close_to_reference(case, lambda c: c.run("triton"))
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("selection", ["glu", "relu"])
def test_the_same_bits_every_run(selection: str, dtype: torch.dtype) -> None:
    sizes = {"T": 1500, "B": 2, "H": 2, "K": 64, "V": 192, "R": (16, 16), "rows": 1100} if ON_GPU else {"T": 40}
    case = moved(Case(**sizes, selection=selection), dtype)
    first = case.kernels()
    assert all(torch.isfinite(x).all() for x in first)
    for _ in range(10 if ON_GPU else 1):
        assert all(torch.equal(x, y) for x, y in zip(first, case.kernels(), strict=True))
