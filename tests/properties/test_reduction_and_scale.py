"""Properties 6 and 7: without sequence mixing this is ReLU attention, and the norm hides the scale of q."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hypermlp.ops import hyper_attention
from tests.helpers import BACKENDS, assert_close, evaluate, make_case, tiles

PLAIN = {"routing": ("identity",), "readout": ("identity",)}


def relu_attention(case):
    """ReLU attention with L2 normalisation, as anyone would write it."""
    q, k, v = (case.tensors[name].transpose(1, 2) for name in "qkv")
    scores = (q @ k.mT).tril()
    return (torch.nn.functional.normalize(scores, dim=-1).relu() @ v).transpose(1, 2)


def assert_reduces(backend, length, heads, batch, op=hyper_attention):
    case = make_case(length=length, heads=heads, batch=batch, selection="relu", **PLAIN)
    assert_close(evaluate(case, lambda c: c.run(backend, op)).named(), evaluate(case, relu_attention).named())


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=15)
@given(length=st.sampled_from([1, 2, 16, 17, 33]), heads=st.integers(1, 3), batch=st.integers(1, 3))
def test_without_mixing_it_is_relu_attention(backend, length, heads, batch):
    with tiles(8):
        assert_reduces(backend, length, heads, batch)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "change", [{"norm": False}, {"eps": 1.0}, {"max_lag": 8}, {"causal": False}], ids=lambda c: next(iter(c))
)
def test_another_normalisation_or_window_is_caught(backend, change):
    def other(*args, **options):
        return hyper_attention(*args, **(options | change))

    with pytest.raises(AssertionError):
        assert_reduces(backend, 9, 2, 1, other)


def assert_scale_free(case, backend, scale, op=hyper_attention):
    scaled = case.with_tensors({"q": case.tensors["q"] * scale})
    assert_close({"output": scaled.run(backend, op)}, {"output": case.run(backend, op)})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-6, 0.3, 7.0, 1e6])
def test_scaling_q_changes_nothing_in_hypermlp(backend, scale):
    assert_scale_free(make_case(selection="relu", eps=1e-30), backend, scale)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", [{"norm": False}, {"eps": 1.0}], ids=lambda c: next(iter(c)))
def test_a_missing_or_clamped_norm_is_caught(backend, change):
    def other(*args, **options):
        return hyper_attention(*args, **(options | change))

    with pytest.raises(AssertionError):
        assert_scale_free(make_case(selection="relu"), backend, 0.01, other)


def active_set(case, backend):
    """Which keys each query selects: with one-hot values the output is the row of weights."""
    length = case.tensors["v"].shape[1]
    one_hot = torch.eye(length, dtype=torch.float64)[None, :, None].expand(1, length, 2, length)
    return case.with_tensors({"v": one_hot}).run(backend) > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_scaling_q_keeps_the_active_set_of_hyperglu(backend):
    case = make_case(readout=("identity",), eps=1e-30)
    scaled = case.with_tensors({"q": case.tensors["q"] * 5})
    expected = active_set(case, backend)
    assert expected.any()
    assert not expected.all()
    assert torch.equal(active_set(scaled, backend), expected)
    # a shift, unlike a scale, selects other keys
    moved = case.with_tensors({"q": case.tensors["q"] + 5})
    assert not torch.equal(active_set(moved, backend), expected)
    assert not torch.allclose(scaled.run(backend), case.run(backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_no_gradient_passes_through_rho_at_or_below_eps(backend, factor):
    """One token, one score of 1: the norm is 1, and eps lies above, on and below it."""
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    q = one.clone().requires_grad_()
    eps = factor
    o = hyper_attention(q, one, one, selection="relu", eps=eps, backend=backend)
    (grad,) = torch.autograd.grad(o.sum(), q)
    assert o.item() == 1 / max(eps, 1)
    # below eps o = q / eps; above it o = q / |q|, whose gradient is zero
    assert grad.item() == (0.0 if factor < 1 else 1 / eps)
