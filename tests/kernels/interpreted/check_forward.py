"""The forward kernels in Triton's interpreter against the reference in float64.

Not collected by name: ``tests/kernels/test_interpreted.py`` runs this file in a process of its own.
"""

from typing import Any

import pytest
import repairs
import torch
import triton
from cases import CASES, TOLERANCE, Case, error

from hypermlp_kernels import launch
from hypermlp_kernels.tiles import KERNELS, Tile
from tests.quick import combinations

repairs.repair()
pytestmark = pytest.mark.skipif(not launch.interpreted(), reason="needs TRITON_INTERPRET=1 before triton is imported")


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel must write starts as NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan")))


def stored_in_chunks(case: Case) -> dict[str, Any]:
    """Three of the longest slots to a chunk: most cases take several chunks, and one holds parts of two blocks."""
    rows = case.tile.rows if case.tile else 32
    columns = min(case.T, case.max_lag or case.T) if case.layout == "lag" else case.T
    element = torch.float32 if case.dtype == torch.float16 else case.dtype
    return {"design": "store", "scratch_limit": 3 * rows * 16 * triton.cdiv(columns, 16) * element.itemsize}


# the designs share all but how the readout comes by its map: in turn, and both where rows are cut in another way
BOTH = {"T65", "T130-window33", "four-groups", "position", "bidirectional", "holes", "packed", "bfloat16"}
DESIGNS = ["recompute", "store"]
FORWARD = combinations(
    CASES, DESIGNS, quick=lambda name, design: name in BOTH or DESIGNS[list(CASES).index(name) % 2] == design
)


@pytest.mark.parametrize(("name", "design"), FORWARD)
def test_forward(name: str, design: str) -> None:
    case = CASES[name]
    o, *statistics = case.kernels(**({"design": design} if design == "recompute" else stored_in_chunks(case)))
    assert o.dtype == torch.promote_types(case.dtype, torch.float32)
    assert error(o, case.reference()) < TOLERANCE[case.dtype]
    for statistic, expected in zip(statistics, case.statistics(), strict=True):
        assert statistic.shape == expected.shape
        assert error(statistic, expected) < TOLERANCE[case.dtype]


def test_recomputed_bits_are_the_same_again() -> None:
    case = Case(T=36, rows=20, dtype=torch.bfloat16)
    for again, expected in zip(case.kernels(design="recompute"), case.kernels(design="recompute"), strict=True):
        assert torch.equal(again, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_bits_are_the_same_again_however_chunked(dtype: torch.dtype) -> None:
    case = Case(T=36, H=2, K=4, V=4, R=(2, 2), rows=20, dtype=dtype)
    first = case.kernels(design="store")
    # three slots of four, so that a chunk ends between two heads, and all again
    for limit in (3 * 32 * 32 * dtype.itemsize, 2**28):
        for again, expected in zip(case.kernels(design="store", scratch_limit=limit), first, strict=True):
            assert torch.equal(again, expected)


def test_the_tiles_of_writer_and_reader_are_free() -> None:
    """The scratch is by row and column, not by tile: what one tiling stores another reads."""
    case = Case(T=70, rows=50)
    mixed = dict.fromkeys(KERNELS, Tile(32, 16, 16, 1, 1))
    for writer, reader in (
        (Tile(64, 32, 0, 1, 1), Tile(16, 16, 16, 1, 1)),
        (Tile(16, 16, 0, 1, 1), Tile(64, 32, 16, 1, 1)),
    ):
        case.chosen = mixed | {"selection_statistics": writer, "stored_readout": reader}
        assert error(case.kernels(design="store")[0], case.reference()) < TOLERANCE[case.dtype]


def test_scratch_keeps_to_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(T=50, H=2, dtype=torch.bfloat16)
    sizes, empty = [], torch.empty

    def recorded(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = empty(*args, **kwargs)
        sizes.append(made.nbytes)
        return made

    monkeypatch.setattr(torch, "empty", recorded)
    case.kernels(design="recompute")
    beside = sorted(sizes)
    for limit in (32 * 64 * 2, 10_000):
        sizes.clear()
        case.kernels(design="store", scratch_limit=limit)
        (scratch,) = [size for size in sizes if size not in beside]
        assert limit / 2 < scratch <= limit
    with pytest.raises(ValueError, match=r"scratch_limit=4095 bytes does not hold 32 rows of 50"):
        case.kernels(design="store", scratch_limit=32 * 64 * 2 - 1)


def test_a_window_makes_the_scratch_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: sizes.append(empty(*a, **k).nbytes) or empty(*a, **k))
    for length in (48, 80):
        Case(T=length, rows=20, dtype=torch.float32).kernels(design="store")
    assert sizes[-1] == max(sizes) == 96 * 32 * 4


def test_digits_of_small_softplus() -> None:
    """A scale map far below zero keeps the digits of its rows: one plus a small number would not."""
    case = Case(dtype=torch.float32, R=(0, 4), diag=(False, True), K=1, T=33)
    case.q[..., 1, :], case.k[..., 1, :] = -14.0, 1.0
    o, expected = case.kernels()[0], case.reference()
    assert float(expected.abs().max()) < 1e-4
    assert error(o, expected) < 1e-5


@pytest.mark.parametrize(
    ("layout", "stream", "design"),
    combinations(
        ["lag", "position"], ["q", "k", "v"], ["recompute", "store"],
        quick=lambda layout, stream, design: (layout == "lag") == (design == "store"),
    ),
)  # fmt: skip
def test_nonfinite_reaches_its_rows_alone(stream: str, layout: str, design: str) -> None:
    window = 10 if layout == "lag" else 40
    case = Case(dtype=torch.float32, rows=window, layout=layout)
    clean = case.kernels(design=design)[0]
    getattr(case, stream)[:, 21, 0, 1] = float("inf") if stream == "v" else float("nan")
    o = case.kernels(design=design)[0]
    seen = torch.zeros(case.T, dtype=torch.bool)
    seen[21 : 22 if stream == "q" else 21 + window] = True
    assert not torch.isfinite(o[:, seen]).any()
    assert torch.equal(o[:, ~seen], clean[:, ~seen])


@pytest.mark.parametrize("design", ["recompute", "store"])
def test_packed_neighbours_do_not_meet(design: str) -> None:
    """Each sequence of a packed batch, whatever its neighbour holds, equals itself alone."""
    case = Case(dtype=torch.float32, bounds=[0, 17, 40], rows=12)
    together = case.kernels(design=design)[0]
    for x in (case.q, case.k, case.v):
        x[:, :17] = float("nan")
    assert torch.equal(case.kernels(design=design)[0][:, 17:], together[:, 17:])
