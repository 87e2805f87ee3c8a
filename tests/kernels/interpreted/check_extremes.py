"""Scores of any size, and numbers that are not finite, in the kernels: forward, backward and single tokens.

Not collected by name: ``tests/kernels/test_interpreted.py`` runs this file in a process of its own.
"""

from typing import Any

import pytest
import repairs
import torch
from decode_cases import Decode
from torch import Tensor

from hypermlp_kernels import launch
from hypermlp_kernels.launch_decode import decode
from tests.helpers import STREAMS, Case, evaluate, make_case
from tests.quick import combinations

repairs.repair()
pytestmark = pytest.mark.skipif(not launch.interpreted(), reason="needs TRITON_INTERPRET=1 before triton is imported")
T, H = 36, 1


def inputs(selection: str = "glu", **options: Any) -> Case:
    sizes = {"length": T, "heads": H, "qk": 8, "v": 8, "ranks": (4, 4)}
    return make_case(**sizes, selection=selection, dtype=torch.float32, **options)


def outcome(case: Case, backend: str, rows: Tensor | None = None) -> dict[str, Tensor]:
    """The output, and the gradients of a loss over ``rows`` ``[B, T]`` of it, all by default."""
    v = case.tensors["v"]
    weight = torch.randn(v.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(v)
    if rows is not None:
        weight = torch.where(rows[..., None, None], weight, 0)
    return evaluate(case, lambda c: c.run(backend), weight).named()


SIZES = combinations(
    ["relu", "glu"], [1e-25, 1e-12, 1e10, 1e17, 1e19, 1e25, 1e30],
    quick=lambda selection, size: size in {"relu": (1e-25, 1e30), "glu": (1e19,)}[selection],
)  # fmt: skip


@pytest.mark.parametrize(("selection", "size"), SIZES)
def test_scores_of_any_size_are_normalised(selection: str, size: float) -> None:
    """Of glu the gates: the product with a scale map as large is beyond float32, which the kernels keep it in."""
    case = inputs(selection, eps=1e-37)
    case.tensors["q"][:, :, :H] *= size
    exact, found = outcome(case.map(Tensor.double), "reference"), outcome(case, "triton")
    for name, x in exact.items():
        assert (found[name].double() - x).abs().max() < 3e-4 * x.abs().max(), name


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e10, 1e19, 1e30])
@pytest.mark.parametrize("splits", [1, 3])
def test_single_tokens_normalise_scores_of_any_size(size: float, splits: int) -> None:
    case = Decode(dtype=torch.float32, splits=splits, selection="relu")
    case.q *= size
    (q, keys, values, *mixes), options = case.arguments()
    found = decode(q, keys, values, *mixes, **(options | {"options": case.options._replace(eps=1e-37)}))
    case.q = case.q.double() / size
    expected = case.expected()
    assert (found.double() - expected).abs().max() < 1e-5 * expected.abs().max()


OPTIONS = {"glu": {}, "position": {"layout": "position"}, "relu": {"selection": "relu", "norm": False}}
LATER = combinations(
    OPTIONS, ["300", "nan", "inf", "-inf"],
    quick=lambda name, value: value == {"glu": "300", "position": "nan", "relu": "-inf"}[name],
)  # fmt: skip


@pytest.mark.parametrize(("name", "value"), LATER)
def test_what_a_later_token_holds_changes_no_bit(name: str, value: str) -> None:
    """Of earlier rows, of the other batch row, and of the gradients of a loss over them."""
    at, case = 21, inputs(**OPTIONS[name], batch=2)
    rows = torch.ones(2, T, dtype=torch.bool)
    rows[0, at:] = False
    other = case.map(Tensor.clone)
    for stream in STREAMS:
        other.tensors[stream][0, at] = float(value)
    found, expected = outcome(other, "triton", rows), outcome(case, "triton", rows)
    for name, x in expected.items():
        keep = rows if name == "output" else slice(None)
        assert torch.equal(found[name][keep], x[keep]), name


# each stream, and each value with each selection
QUICK = {
    "glu": {"q": "inf", "v": "nan", "readout.core": "-inf"},
    "relu": {"q": "nan", "k": "-inf", "routing.core": "inf"},
}
SEEN = combinations(
    ["glu", "relu"], STREAMS, ["nan", "inf", "-inf"],
    quick=lambda name, stream, value: value == QUICK[name].get(stream),
)  # fmt: skip


@pytest.mark.parametrize(("name", "stream", "value"), SEEN)
def test_rows_that_see_a_number_that_is_not_finite_are_nan(name: str, stream: str, value: str) -> None:
    at, case = 21, inputs(**OPTIONS[name])
    case.tensors[stream][0, at, :, 1] = float(value)
    found = outcome(case, "triton")
    sees = torch.arange(T) >= at if stream in ("k", "v") else torch.arange(T) == at
    assert torch.equal(found["output"].isnan().flatten(2).all(-1)[0], sees)
    assert torch.equal(found["output"].isnan().flatten(2).any(-1)[0], sees)
    for gradient, expected in outcome(case, "reference").items():
        if gradient != "output":
            assert (found[gradient] - expected).abs().max() <= 1e-3 * expected.abs().max(), gradient


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("stream", ["q", "k"])
@pytest.mark.parametrize("options", [{}, {"selection": "relu"}, {"selection": "relu", "norm": False}], ids=str)
def test_a_single_token_that_sees_one_is_not_finite(value: float, stream: str, options: dict) -> None:
    case = Decode(dtype=torch.float32, K=1, R=(0, 0), diag=(False, False), **options)
    case.q, case.k = case.q.abs(), case.k.abs()
    x = getattr(case, stream)
    x[0, -1 if stream == "q" else 9] = value
    assert not case.run().isfinite().any()
