"""NaN and infinity: rows that see one are NaN, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import BACKENDS, STREAMS, make_case, tiles

BAD = [float("nan"), float("inf"), -float("inf")]
LENGTH, AT, WINDOW = 24, 9, 6


def with_bad(case, stream, value, batch=0):
    x = case.tensors[stream].clone()
    x[batch, AT] = value
    return case.with_tensors({stream: x})


def compare(case, stream, value, backend, **seen):
    """Rows ``[B, T]`` whose output changed, and those that are not finite any more."""
    with tiles(5):
        clean, marked = case.run(backend, **seen), with_bad(case, stream, value).run(backend, **seen)
    assert clean.isfinite().all()
    bad = ~marked.isfinite().flatten(2).all(-1)
    changed = ((clean - marked).abs() > 1e-12).flatten(2).any(-1) | bad
    return changed[0], bad[0], changed[1:]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("value", BAD)
def test_earlier_rows_and_other_batch_rows_are_unaffected(backend, stream, value):
    case = make_case(length=LENGTH, batch=2)
    changed, bad, others = compare(case, stream, value, backend)
    assert not changed[:AT].any()
    assert not others.any()
    expected = torch.arange(LENGTH) >= AT if stream in ("k", "v") else torch.arange(LENGTH) == AT
    assert torch.equal(bad, expected), "a row that sees it must say so"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("value", BAD)
def test_rows_beyond_the_window_are_unaffected(backend, stream, value):
    case = make_case(length=LENGTH, batch=2, max_lag=WINDOW)
    changed, bad, _ = compare(case, stream, value, backend)
    reach = WINDOW if stream in ("k", "v") else 1
    sees = (torch.arange(LENGTH) >= AT) & (torch.arange(LENGTH) < AT + reach)
    assert not changed[~sees].any()
    assert bad[sees].all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("causal", [True, False])
def test_packed_neighbours_are_unaffected(backend, stream, value, causal):
    case = make_case(length=LENGTH, causal=causal)
    bounds = torch.tensor([0, 7, 13, LENGTH])
    changed, _, _ = compare(case, stream, value, backend, cu_seqlens=bounds)
    assert not changed[:7].any()
    assert not changed[13:].any()
    assert changed[AT].any()


def gradients(case, backend, **seen):
    inputs = case.map(lambda x: x.clone().requires_grad_())
    with tiles(5):
        o = inputs.run(backend, **seen)
    o.backward(torch.where(o.isfinite(), 1.0, 0.0))
    return {name: x.grad for name, x in inputs.tensors.items()}


@pytest.mark.parametrize("stream", STREAMS)
def test_gradients_of_packed_neighbours_stay_finite(stream):
    """The chunked path alone promises it: a dense product multiplies every pair."""
    bounds = torch.tensor([0, 7, 13, LENGTH])
    grads = gradients(with_bad(make_case(length=LENGTH), stream, float("nan")), "chunked", cu_seqlens=bounds)
    for name in STREAMS:
        assert grads[name][:, :7].isfinite().all(), name
        assert grads[name][:, 13:].isfinite().all(), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("value", BAD)
def test_in_a_masked_token_it_reaches_nothing(backend, stream, value):
    case = make_case(length=LENGTH, batch=2)
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[0, AT] = False
    changed, bad, others = compare(case, stream, value, backend, attention_mask=mask)
    assert not (changed.any())
    assert not (bad.any())
    assert not (others.any())
    clean = gradients(case, backend, attention_mask=mask)
    marked = gradients(with_bad(case, stream, value), backend, attention_mask=mask)
    assert all(torch.equal(clean[name], marked[name]) for name in clean)


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_whose_sum_overflows_are_not_taken_for_infinite(backend):
    mixes = {"routing": ("identity",), "readout": ("identity",)}
    case = make_case(length=3, dtype=torch.float32, selection="relu", **mixes)
    big = torch.full_like(case.tensors["v"], 1.5e38)  # a row weighs them by at most sqrt(3)
    assert big.sum().isinf()
    assert case.with_tensors({"v": big}).run(backend).isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_in_a_table_is_not_hidden(backend):
    case = make_case(length=6)
    down = case.tensors["routing.down"].clone()
    down[:, 3] = float("nan")
    assert case.with_tensors({"routing.down": down}).run(backend)[:, 3:].isnan().all()
