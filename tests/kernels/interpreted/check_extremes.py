"""Scores of any size, and numbers that are not finite, in the kernels: forward, backward and single tokens.

Not collected by name: ``tests/kernels/test_interpreted.py`` runs this file in a process of its own.
"""

import pytest
import repairs
import torch
from decode_cases import Decode

from hypermlp.ops import SequenceMix, hyper_attention
from hypermlp_kernels import launch
from hypermlp_kernels.launch_decode import decode

repairs.repair()
pytestmark = pytest.mark.skipif(not launch.interpreted(), reason="needs TRITON_INTERPRET=1 before triton is imported")
T, H, K, V, R = 36, 1, 8, 8, 4
NAMES = ("q", "k", "v", "diag1", "down1", "up1", "gate1", "diag2", "down2", "up2", "gate2")
ALONG = ("q", "k", "v", "gate1", "gate2")


def inputs(selection: str, batch: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    maps = 2 * H if selection == "glu" else H
    shapes = [(batch, T, maps, K)] * 2 + [(batch, T, H, V)]
    for heads in (maps, H):
        shapes += [(heads, T), (heads, T, R), (heads, T, R), (batch, T, heads, R)]
    made = [(0.5 * torch.randn(shape, generator=rng, dtype=torch.float64)).to(dtype) for shape in shapes]
    return dict(zip(NAMES, made, strict=True))


def outcome(tensors: dict[str, torch.Tensor], backend: str, rows: torch.Tensor | None = None, **options):
    """The output, and the gradients of a loss over ``rows`` ``[B, T]`` of it, all by default."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    x = list(leaves.values())
    o = hyper_attention(*x[:3], SequenceMix(*x[3:7]), SequenceMix(*x[7:]), backend=backend, **options)
    weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(o)
    if rows is not None:
        weight = torch.where(rows[..., None, None], weight, 0)
    o.backward(weight)
    return {"output": o.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("selection", ["relu", "glu"])
@pytest.mark.parametrize("size", [1e-25, 1e-12, 1e10, 1e17, 1e19, 1e25, 1e30])
def test_scores_of_any_size_are_normalised(selection: str, size: float) -> None:
    """Of glu the gates: the product with a scale map as large is beyond float32, which the kernels keep it in."""
    tensors = inputs(selection)
    tensors["q"][:, :, :H] *= size
    exact = outcome({name: x.double() for name, x in tensors.items()}, "reference", selection=selection, eps=1e-37)
    found = outcome(tensors, "triton", selection=selection, eps=1e-37)
    for name, x in exact.items():
        assert (found[name].double() - x).abs().max() < 3e-4 * x.abs().max(), name


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e10, 1e19, 1e30])
@pytest.mark.parametrize("splits", [1, 3])
def test_single_tokens_normalise_scores_of_any_size(size: float, splits: int) -> None:
    case = Decode(dtype=torch.float32, splits=splits, selection="relu")
    case.q *= size
    (q, keys, values, *mixes), options = case.arguments()
    found = decode(q, keys, values, *mixes, **(options | {"eps": 1e-37}))
    case.q = case.q.double() / size
    expected = case.expected()
    assert (found.double() - expected).abs().max() < 1e-5 * expected.abs().max()


VALUES = {"large": 300.0, "nan": float("nan"), "inf": float("inf"), "-inf": -float("inf")}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("options", [{}, {"layout": "position"}, {"selection": "relu", "norm": False}], ids=str)
def test_what_a_later_token_holds_changes_no_bit(value: float, options: dict) -> None:
    """Of earlier rows, of the other batch row, and of the gradients of a loss over them."""
    at, options = 21, {"selection": "glu", **options}
    tensors = inputs(options["selection"], batch=2)
    rows = torch.ones(2, T, dtype=torch.bool)
    rows[0, at:] = False
    other = {name: x.clone() for name, x in tensors.items()}
    for name in ALONG:
        other[name][0, at] = value
    found, expected = outcome(other, "triton", rows, **options), outcome(tensors, "triton", rows, **options)
    for name, x in expected.items():
        keep = rows if name == "output" else slice(None)
        assert torch.equal(found[name][keep], x[keep]), name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("stream", ALONG)
@pytest.mark.parametrize("options", [{}, {"selection": "relu", "norm": False}], ids=str)
def test_rows_that_see_a_number_that_is_not_finite_are_nan(value: float, stream: str, options: dict) -> None:
    at, options = 21, {"selection": "glu", **options}
    tensors = inputs(options["selection"])
    tensors[stream][0, at, :, 1] = value
    found = outcome(tensors, "triton", **options)
    sees = torch.arange(T) >= at if stream in ("k", "v") else torch.arange(T) == at
    assert torch.equal(found["output"].isnan().flatten(2).all(-1)[0], sees)
    assert torch.equal(found["output"].isnan().flatten(2).any(-1)[0], sees)
    expected = outcome(tensors, "reference", **options)
    for name in NAMES:
        if name != "output":
            assert (found[name] - expected[name]).abs().max() <= 1e-3 * expected[name].abs().max(), name


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
