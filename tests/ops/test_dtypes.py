"""Float64, float32, bfloat16, float16 and autocast, judged by what the plain equations lose in each."""

from __future__ import annotations

import pytest
import torch

from hypermlp.ops import chunked, hyper_attention
from hypermlp.ops.arguments import OperatorArgs, Options
from hypermlp.ops.varlen import Tokens
from tests.helpers import BACKENDS, STREAMS, Case, assert_close_to_reference, evaluate, make_case, tiles

LOW = [torch.float32, torch.bfloat16, torch.float16]
CASES = {
    "glu": {},
    "relu": {"selection": "relu"},
    "window": {"max_lag": 20},
    "bidirectional": {"causal": False},
    "no norm": {"norm": False, "selection": "relu"},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("chosen", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("seed", [0, 1])
def test_no_path_loses_more_than_the_plain_equations(backend, dtype, chosen, seed):
    case = make_case(seed, length=70, batch=2, qk=8, v=8, dtype=dtype, **chosen)
    with tiles(16):
        assert_close_to_reference(case, lambda c: c.run(backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-3])
def test_gradients_that_cancel_are_not_drowned_by_a_rounded_output(backend, dtype, scale):
    """No score changes sign, so scaling a row of scores changes nothing: q's gradient along k is zero."""
    q, k = (torch.tensor(x).reshape(1, 2, 1, 1).to(dtype) for x in ([0.3 * scale, 0.7 * scale], [1.0, 2.0]))
    v, weight = (torch.randn(1, 2, 1, 64).to(dtype) for _ in range(2))
    q.requires_grad_()
    o = hyper_attention(q, k, v, selection="relu", backend=backend)
    (grad,) = torch.autograd.grad(o, q, weight)
    assert grad.abs().max() <= 100 * torch.finfo(torch.float32).eps / (0.3 * scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_path_that_loses_three_times_as_much_is_caught(dtype):
    case = make_case(length=70, qk=8, v=8, dtype=dtype)

    def sloppy(c):
        o = c.run("chunked")
        return o + 6 * (o * 1.01 - o.double() * 1.01).to(dtype) + 0.05 * o

    with pytest.raises(AssertionError, match="error"):
        assert_close_to_reference(case, sloppy)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tables_may_stay_wider_than_the_streams(backend, dtype):
    case = make_case(length=20)
    mixed = case.with_tensors({n: x.to(dtype) if n in STREAMS else x.float() for n, x in case.tensors.items()})
    found = evaluate(mixed, lambda c: c.run(backend))
    assert found.output.dtype == dtype
    assert {g.dtype for g in found.streams.values()} == {dtype}
    assert {g.dtype for g in found.shared.values()} == {torch.float32}
    wide = evaluate(mixed.map(lambda x: x.float()), lambda c: c.run(backend))
    torch.testing.assert_close(found.output.float(), wide.output, rtol=0.02, atol=0.02)


def statistics(case: Case):
    q, k, v = (case.tensors[name] for name in "qkv")
    o = case.options
    options = Options(o["selection"], o["norm"], o["eps"], o["causal"], "lag", q.shape[1])
    return chunked.forward(OperatorArgs(q, k, v, *case.mixes(), Tokens(), options))


@pytest.mark.parametrize("dtype", [*LOW, torch.float64], ids=str)
def test_what_the_backward_reads_is_float32_or_better(dtype):
    case = make_case(length=40, dtype=dtype)
    found = statistics(case)
    assert all(x.dtype == torch.promote_types(dtype, torch.float32) for x in found)
    exact = statistics(case.map(lambda x: x.double()))
    for x, y in zip(found, exact, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("scale", [1e3, 1e-3])
def test_large_and_small_scores_stay_finite_and_exact(backend, dtype, scale):
    """Scores of 1e3 overflow a plain exp; the norm keeps float16 outputs in range."""
    case = make_case(length=40, qk=8, dtype=dtype)
    case = case.with_tensors({"q": case.tensors["q"] * scale})
    if dtype == torch.float16 and scale > 1:
        # the scale map is not normalised: keep softplus of it inside float16
        q = case.tensors["q"].clone()
        q[:, :, 2:] /= scale
        case = case.with_tensors({"q": q})
    found = evaluate(case, lambda c: c.run(backend))
    assert all(x.isfinite().all() for x in [found.output, *found.streams.values(), *found.shared.values()])
    exact = evaluate(case.map(lambda x: x.double()), lambda c: c.run("reference"))
    step = torch.finfo(dtype).eps
    size = exact.output.abs().max()
    assert (found.output.double() - exact.output).abs().max() <= max(step, 1e-5) * size


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("below", [80.0, 79.9, 80.1, 88.7, 89.5, 700.0, -100.0])
def test_softplus_is_right_on_both_sides_of_where_exp_overflows(backend, below):
    q = torch.tensor([1.0, below]).reshape(1, 1, 2, 1).requires_grad_()
    one = torch.ones(1, 1, 2, 1)
    o = hyper_attention(q, one, one[:, :, :1], backend=backend)
    expected = torch.nn.functional.softplus(torch.tensor(below, dtype=torch.float64))
    torch.testing.assert_close(o.double().flatten(), expected[None], rtol=1e-6, atol=1e-37)
    (grad,) = torch.autograd.grad(o.sum(), q)
    slope = torch.sigmoid(torch.tensor(below, dtype=torch.float64))
    torch.testing.assert_close(grad.double().flatten()[1], slope, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [*LOW, torch.float64], ids=str)
def test_rows_of_zero_scores_are_zero_with_finite_gradients(backend, dtype):
    case = make_case(length=6, dtype=dtype)
    case = case.with_tensors({"q": torch.zeros_like(case.tensors["q"])})
    found = evaluate(case, lambda c: c.run(backend))
    assert not found.output.any()
    assert all(not g.isnan().any() for g in found.streams.values())


AUTOCAST = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", AUTOCAST, ids=str)
@pytest.mark.parametrize("backward_inside", [True, False])
def test_autocast_casts_the_streams_and_keeps_the_tables(backend, dtype, backward_inside):
    case = make_case(length=20, dtype=torch.float32)
    inputs = case.map(lambda x: x.clone().requires_grad_())
    with torch.autocast("cpu", dtype):
        o = inputs.run(backend)
        if backward_inside:
            o.float().square().sum().backward()
    if not backward_inside:
        o.float().square().sum().backward()
    assert o.dtype == dtype
    assert all(x.grad.dtype == torch.float32 for x in inputs.tensors.values())

    by_hand = case.map(lambda x: x.clone().requires_grad_())
    cast = by_hand.with_tensors({n: x.to(dtype) for n, x in by_hand.tensors.items() if n in STREAMS})
    expected = cast.run(backend)
    expected.float().square().sum().backward()
    assert torch.equal(o, expected)
    if backend == "reference" and backward_inside:
        return  # plain PyTorch: its backward is then run in the region's dtype
    for name, x in inputs.tensors.items():
        assert torch.equal(x.grad, by_hand.tensors[name].grad), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_takes_streams_of_different_dtypes(backend):
    case = make_case(length=5, dtype=torch.float32)
    mixed = case.with_tensors({"q": case.tensors["q"].bfloat16()})
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mixed.run(backend), case.run(backend))
    with pytest.raises(TypeError, match=r"q is torch\.bfloat16"):
        mixed.run(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_float64_alone(backend):
    case = make_case(length=5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(case.run(backend), case.run(backend))
        assert case.run(backend).dtype == torch.float64
