"""The kernels on a GPU: the interpreter's cases again, the same bits every run, and offsets beyond 32 bits."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed on this platform")
sys.path.insert(0, str(Path(__file__).parent / "interpreted"))

from cases import CASES, TOLERANCE, Case, error

from hypermlp.ops import hyper_attention

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def as_dtype(case: Case, dtype: torch.dtype) -> Case:
    """The case on the GPU with inputs of ``dtype``."""
    moved = case.to("cuda")
    moved.q, moved.k, moved.v = (x.to(dtype) for x in (moved.q, moved.k, moved.v))
    moved.mixes = [
        mix._replace(**{name: x.to(dtype) for name, x in mix._asdict().items() if isinstance(x, torch.Tensor)})
        for mix in moved.mixes
    ]
    return moved


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan")))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.dtype == torch.float64])
def test_forward(name: str, dtype: torch.dtype) -> None:
    # the interpreter's tiles are too small for a GPU's dots: here the table's are taken
    case = as_dtype(CASES[name], dtype)
    case.tile = None
    o, *statistics = case.kernels()
    assert error(o, case.reference()) < 2 * TOLERANCE[dtype]
    for statistic, expected in zip(statistics, case.statistics(), strict=True):
        assert error(statistic, expected) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("selection", ["glu", "relu"])
def test_long_rows_and_the_same_bits_every_run(selection: str, dtype: torch.dtype) -> None:
    case = as_dtype(Case(T=1500, B=2, H=2, K=64, V=192, R=(16, 16), rows=1100, selection=selection), dtype)
    first = case.kernels()
    assert error(first[0], case.reference()) < 2 * TOLERANCE[dtype]
    for _ in range(5):
        assert all(torch.equal(x, y) for x, y in zip(first, case.kernels(), strict=True))


def test_compiles_to_one_graph() -> None:
    case = as_dtype(Case(T=130, H=2, K=16, V=32), torch.bfloat16)

    def attend() -> torch.Tensor:
        return hyper_attention(case.q, case.k, case.v, *case.mixes, backend="triton")

    torch.testing.assert_close(torch.compile(attend, fullgraph=True)(), attend())


@pytest.mark.slow
def test_offsets_beyond_32_bits() -> None:
    """More than 2^31 elements of values: the last batch row is computed as if it were alone."""
    batch, length, width = 5, 1 << 18, 2048
    q = torch.randn(batch, length, 2, 16, device="cuda", dtype=torch.bfloat16)
    v = torch.randn(batch, length, 1, width, device="cuda", dtype=torch.bfloat16)
    assert v.numel() > 2**31
    o = hyper_attention(q, q, v, max_lag=64, backend="triton")
    assert torch.equal(o[-1:], hyper_attention(q[-1:], q[-1:], v[-1:], max_lag=64, backend="triton"))
