"""The decoding kernels in Triton's interpreter against the reference in float64.

Not collected by name: ``tests/kernels/test_interpreted.py`` runs this file in a process of its own.
"""

import pytest
import repairs
import torch
from cases import TOLERANCE, error
from decode_cases import CASES, Decode

from hypermlp_kernels import launch

repairs.repair()
pytestmark = pytest.mark.skipif(not launch.interpreted(), reason="needs TRITON_INTERPRET=1 before triton is imported")


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel must write starts as NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan")))


@pytest.mark.parametrize("name", CASES)
def test_decode(name: str) -> None:
    case = CASES[name]
    o = case.run()
    assert o.dtype == case.dtype
    assert o.shape == (case.B, 1, case.H, case.V)
    expected = case.expected()
    assert error(o, expected) < TOLERANCE[case.dtype]
    if case.mask_tensor is not None:
        assert not o[~case.mask_tensor.any(1)].any()
