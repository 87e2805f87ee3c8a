"""The forward kernels in Triton's interpreter against the reference in float64.

Not collected by name: ``tests/kernels/test_interpreted.py`` runs this file in a process of its own.
"""

from typing import Any

import pytest
import repairs
import torch
from cases import CASES, TOLERANCE, Case, error

from hypermlp_kernels import launch

repairs.repair()
pytestmark = pytest.mark.skipif(not launch.interpreted(), reason="needs TRITON_INTERPRET=1 before triton is imported")


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel must write starts as NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan")))


# the second scratch is so small that every slot is a chunk of its own, the third holds a few slots
DESIGNS: dict[str, dict[str, Any]] = {
    "recompute": {"design": "recompute"},
    "store": {"design": "store"},
    "store-slots": {"design": "store", "scratch_limit": 1},
    "store-chunks": {"design": "store", "scratch_limit": 3 * 32 * 64 * 8},
}


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("name", CASES)
def test_forward(name: str, design: str) -> None:
    case = CASES[name]
    o, *statistics = case.kernels(**DESIGNS[design])
    assert o.dtype == torch.promote_types(case.dtype, torch.float32)
    assert error(o, case.reference()) < TOLERANCE[case.dtype]
    for statistic, expected in zip(statistics, case.statistics(), strict=True):
        assert statistic.shape == expected.shape
        assert error(statistic, expected) < TOLERANCE[case.dtype]


def test_digits_of_small_softplus() -> None:
    """A scale map far below zero keeps the digits of its rows: one plus a small number would not."""
    case = Case(dtype=torch.float32, R=(0, 4), diag=(False, True), K=1, T=33)
    case.q[..., 1, :], case.k[..., 1, :] = -14.0, 1.0
    o, expected = case.kernels()[0], case.reference()
    assert float(expected.abs().max()) < 1e-4
    assert error(o, expected) < 1e-5


@pytest.mark.parametrize("stream", ["q", "k", "v"])
@pytest.mark.parametrize("layout", ["lag", "position"])
def test_nonfinite_reaches_its_rows_alone(stream: str, layout: str) -> None:
    window = 10 if layout == "lag" else 40
    case = Case(dtype=torch.float32, rows=window, layout=layout)
    clean = case.kernels()[0]
    getattr(case, stream)[:, 21, 0, 1] = float("inf") if stream == "v" else float("nan")
    o = case.kernels()[0]
    seen = torch.zeros(case.T, dtype=torch.bool)
    seen[21 : 22 if stream == "q" else 21 + window] = True
    assert not torch.isfinite(o[:, seen]).any()
    assert torch.equal(o[:, ~seen], clean[:, ~seen])


def test_packed_neighbours_do_not_meet() -> None:
    """Each sequence of a packed batch, whatever its neighbour holds, equals itself alone."""
    case = Case(dtype=torch.float32, bounds=[0, 17, 40], rows=12)
    together = case.kernels()[0]
    for x in (case.q, case.k, case.v):
        x[:, :17] = float("nan")
    assert torch.equal(case.kernels()[0][:, 17:], together[:, 17:])
