"""Functions that the kernels are made of, each against the same computed another way.

Not collected by name: ``tests/kernels/test_interpreted.py`` runs this file in a process of its own.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import repairs
import torch
import triton
import triton.language as tl

from hypermlp_kernels import launch
from hypermlp_kernels.selection import softplus2
from hypermlp_kernels.skew import rotate, rotate_halves, rotation_index
from hypermlp_kernels.visibility import stretches

repairs.repair()
pytestmark = pytest.mark.skipif(not launch.interpreted(), reason="needs TRITON_INTERPRET=1 before triton is imported")


@triton.jit
def softplus_kernel(p_u, p_out, SIZE: tl.constexpr, EXACT: tl.constexpr):
    o = tl.arange(0, SIZE)
    tl.store(p_out + o, softplus2(tl.load(p_u + o), EXACT, False))


# of the polynomial, and of 1 + e where the logarithm takes over: half a unit of 1 beside e = 2^-6
@pytest.mark.parametrize(("exact", "error"), [(False, 8.6e-6), (True, 2.0**-18)])
def test_softplus_keeps_its_relative_error(exact: bool, error: float) -> None:
    """Far below zero as above, where it is as small as ``2^u``."""
    u = torch.cat((torch.linspace(-120, 120, 2**12 - 2), torch.tensor([0.0, -6.0])))
    found = torch.empty_like(u)
    softplus_kernel[(1,)](u, found, SIZE=u.numel(), EXACT=exact)
    expected = np.logaddexp2(0.0, u.double().numpy())
    assert np.max(np.abs(found.double().numpy() / expected - 1)) < error


def test_softplus_of_what_is_not_finite() -> None:
    u, found = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0]), torch.empty(4)
    softplus_kernel[(1,)](u, found, SIZE=4, EXACT=False)
    assert found[0].isnan()
    assert found[1:].tolist() == pytest.approx([float("inf"), 0.0, 1.0], rel=1e-5)


@triton.jit
def rotate_kernel(p_x, p_other, p_out, TURN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    o = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
    b_x, b_other = tl.load(p_x + o), tl.load(p_other + o)
    b_index = rotation_index(b_x, BM, BN, False, TURN)
    b_out = rotate(b_x, b_other, b_index, BM, BN) if TURN == "both" else rotate_halves(b_x, b_other, b_index, BM, BN)
    tl.store(p_out + o, b_out)


@pytest.mark.parametrize("turn", ["both", "halves"])
@pytest.mark.parametrize(("rows", "keys"), [(16, 16), (64, 16), (32, 32), (128, 64)])
def test_a_rotation_takes_each_element_from_its_tile(rows: int, keys: int, turn: str) -> None:
    x, other = torch.rand(2, rows, keys)
    found = torch.empty_like(x)
    rotate_kernel[(1,)](x, other, found, TURN=turn, BM=rows, BN=keys)
    for m in range(rows):
        for c in range(keys):
            assert found[m, c] == (x if c <= m % keys else other)[m, (m - c) % keys]
    again = torch.empty_like(x)
    # keys to lags and back: right where both ways take the same tile
    rotate_kernel[(1,)](found, found, again, TURN=turn, BM=rows, BN=keys)
    current = torch.arange(keys) <= torch.arange(rows)[:, None] % keys
    assert torch.equal(again[current], x[current])


@triton.jit
def stretches_kernel(p_out, i0, n, max_lag, t_first, t_stop, C: tl.constexpr):
    rows = SimpleNamespace(i0=i0, n=n, max_lag=max_lag)
    first, low, high, stop = stretches(rows, t_first, t_stop, C)
    tl.store(p_out, first)
    tl.store(p_out + 1, low)
    tl.store(p_out + 2, high)
    tl.store(p_out + 3, stop)


@pytest.mark.parametrize(("by_lag", "causal"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("max_lag", [1000, 150, 97, 64, 1])
def test_between_the_edges_every_row_sees_every_key(by_lag: bool, causal: bool, max_lag: int) -> None:
    """Keys, and the keys of a tile's columns; what is left to the edges does not grow with the rows."""
    rows, keys, n = 32, 16, 200
    window = max_lag if by_lag else n
    constants = SimpleNamespace(HOLES=False, BY_LAG=by_lag, CAUSAL=causal, BM=rows, BN=keys)
    for i0 in range(0, n, rows):
        t_first = max(i0 + 1 - window, 0) // keys
        t_stop = -(-min(i0 + rows, n) // keys) if causal else -(-n // keys)
        bounds = torch.empty(4, dtype=torch.int32)
        stretches_kernel[(1,)](bounds, i0, n, max_lag, t_first, t_stop, C=constants)
        first, low, high, stop = bounds.tolist()
        assert first == t_first <= low <= high <= stop == t_stop
        for t in range(low, high):
            for i in range(i0, min(i0 + rows, n)):
                last = i if causal else n - 1
                seen = range(max(i + 1 - window, 0), last + 1)
                # by lag a row's columns have keys of this tile and of the one before
                for j in range(t * keys - (keys - 1 if by_lag else 0), (t + 1) * keys):
                    assert j in seen, (i, j)
        assert (low - first) + (stop - high) <= 2 + 2 * rows // keys + 2 or high == low
