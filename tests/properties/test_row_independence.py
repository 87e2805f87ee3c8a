"""A row depends on what it sees, bit for bit: its values, and every gradient of a loss over such rows."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import BACKENDS, STREAMS, make_case, tiles

LENGTH, AT = 24, 13
CHOSEN = {
    "glu": {},
    "relu": {"selection": "relu"},
    "window": {"max_lag": 7},
    "position": {"layout": "position"},
    "no norm": {"norm": False},
}
# in every stream at once, and in one alone
ALL = {"large": 300.0, "larger": 1e4, "nan": float("nan"), "inf": float("inf"), "-inf": -float("inf")}
ALONE = {"huge": 1e30, "nan": float("nan"), "inf": float("inf"), "-inf": -float("inf")}


def changed(case, streams, value, batch=0, at=AT):
    tensors = {name: case.tensors[name].clone() for name in streams if name in case.tensors}
    for x in tensors.values():
        x[batch, at] = value
    return case.with_tensors(tensors)


def outcome(case, backend, rows, **seen):
    """Outputs of ``rows`` ``[B, T]`` and the gradients of a loss over them alone."""
    case = case.map(lambda x: x.detach().clone().requires_grad_())
    with tiles(5):
        o = case.run(backend, **seen)
    generator = torch.Generator().manual_seed(5)
    weight = torch.where(rows[..., None, None], torch.randn(o.shape, generator=generator).to(o.dtype), 0)
    o.backward(weight)
    return {"output": o.detach()[rows]} | {name: x.grad for name, x in case.tensors.items()}


def assert_same(backend, case, other, rows, **seen):
    found, expected = outcome(other, backend, rows, **seen), outcome(case, backend, rows, **seen)
    for name, x in expected.items():
        assert x.isfinite().all()
        assert torch.equal(found[name], x), f"{name} differs by {(found[name] - x).abs().max():.1e}"


def rows_before(batch):
    rows = torch.ones(batch, LENGTH, dtype=torch.bool)
    rows[0, AT:] = False
    return rows


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chosen", CHOSEN.values(), ids=CHOSEN)
@pytest.mark.parametrize("value", ALL.values(), ids=ALL)
def test_what_a_later_token_holds_changes_no_bit(backend, dtype, chosen, value):
    """Nor what a token of another batch row holds: earlier rows and the other row are one comparison."""
    case = make_case(length=LENGTH, batch=2, qk=8, dtype=dtype, **chosen)
    assert_same(backend, case, changed(case, STREAMS, value), rows_before(2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chosen", CHOSEN.values(), ids=CHOSEN)
@pytest.mark.parametrize("value", ALONE.values(), ids=ALONE)
@pytest.mark.parametrize("stream", STREAMS)
def test_what_one_stream_of_it_holds_changes_no_bit(backend, chosen, value, stream):
    case = make_case(length=LENGTH, batch=2, qk=8, dtype=torch.float32, **chosen)
    if not case.options["norm"] and value == 1e30:
        value = 1e15  # the product of the two maps is its square
    assert_same(backend, case, changed(case, [stream], value), rows_before(2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", ALL.values(), ids=ALL)
@pytest.mark.parametrize("causal", [True, False])
def test_what_a_packed_neighbour_holds_changes_no_bit(backend, value, causal):
    case = make_case(length=LENGTH, qk=8, dtype=torch.float32, causal=causal)
    rows = torch.ones(1, LENGTH, dtype=torch.bool)
    rows[0, 9:18] = False
    bounds = torch.tensor([0, 9, 18, 24])
    assert_same(backend, case, changed(case, STREAMS, value), rows, cu_seqlens=bounds)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", ALL.values(), ids=ALL)
@pytest.mark.parametrize("chosen", CHOSEN.values(), ids=CHOSEN)
def test_what_padding_holds_changes_no_bit(backend, value, chosen):
    case = make_case(length=LENGTH, batch=2, qk=8, dtype=torch.float32, **chosen)
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[0, AT] = mask[0, :2] = mask[1, 20:] = False
    other = changed(changed(case, STREAMS, value), STREAMS, value, batch=1, at=slice(20, None))
    assert_same(backend, case, other, torch.ones(2, LENGTH, dtype=torch.bool), attention_mask=mask)


@pytest.mark.parametrize("columns", [7, 64, 130])
def test_softplus_is_made_element_by_element(columns):
    from hypermlp.ops.softplus import softplus_

    u = torch.randn(24, columns) * 20
    expected = torch.nn.functional.softplus(u.double(), threshold=80)
    for value in (79.9, 80.0, 89.0, 1e30, float("inf"), float("nan")):
        other = u.clone()
        other[3, 5] = value
        found, plain = softplus_(other.clone()), softplus_(u.clone())
        keep = torch.ones_like(u, dtype=torch.bool)
        keep[3, 5] = False
        assert torch.equal(found[keep], plain[keep])
        torch.testing.assert_close(found[keep].double(), expected[keep], rtol=3e-7, atol=0)
        torch.testing.assert_close(found[3, 5], torch.tensor(value), equal_nan=True)
