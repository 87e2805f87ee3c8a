"""Property 8: gradients, against finite differences and of every path against the reference."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.gradcheck import GradcheckError

from hypermlp.ops import chunked
from hypermlp.ops.library import PATHS
from tests.helpers import BACKENDS, Case, assert_close, evaluate, make_case, tiles
from tests.quick import combinations

CASES = {
    "glu": {},
    "relu": {"selection": "relu"},
    "no norm": {"norm": False},
    "window": {"max_lag": 3},
    "by position": {"layout": "position"},
    "bidirectional": {"causal": False},
    "without identity": {"routing": ("diag", "low_rank"), "readout": ("low_rank", "core")},
}


def gradcheck(case: Case, backend: str, check=torch.autograd.gradcheck, **kwargs) -> bool:
    names, tensors = zip(*((n, x.clone().requires_grad_()) for n, x in case.tensors.items()), strict=True)

    def run(*inputs):
        return case.with_tensors(dict(zip(names, inputs, strict=True))).run(backend, **kwargs)

    return check(run, tensors)


# the reference's are PyTorch's own
FINITE = combinations(BACKENDS, CASES, quick=lambda backend, name: backend != "reference" or name == "glu")


@pytest.mark.parametrize(("backend", "name"), FINITE)
def test_gradients_equal_finite_differences(backend, name):
    with tiles(2):
        assert gradcheck(make_case(length=5, heads=1, qk=2, v=2, ranks=(1, 2), **CASES[name]), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_equal_finite_differences_with_mask_and_packing(backend):
    case = make_case(length=6, heads=1, qk=2, v=2, ranks=(1, 2))
    mask, bounds = torch.tensor([[0, 1, 1, 1, 0, 1]]), torch.tensor([0, 3, 6])
    with tiles(2):
        assert gradcheck(case, backend, attention_mask=mask, cu_seqlens=bounds)


@pytest.mark.parametrize("chosen", [{}, {"selection": "relu", "causal": False}], ids=str)
def test_second_derivatives_of_the_reference_equal_finite_differences(chosen):
    case = make_case(length=3, heads=1, qk=1, v=1, ranks=(1, 1), **chosen)
    assert gradcheck(case, "reference", torch.autograd.gradgradcheck)


def assert_gradients_equal_the_reference(case):
    with tiles(4):
        actual = evaluate(case, lambda c: c.run("chunked")).named()
    assert_close(actual, evaluate(case, lambda c: c.run("reference")).named())


def with_options(backward, **options):
    return lambda grad_o, outputs, x, needs: backward(
        grad_o, outputs, x._replace(options=x.options._replace(**options)), needs
    )


def forget_rho(backward):
    return with_options(backward, norm=False)


def forget_causality(backward):
    return with_options(backward, causal=False)


def slightly_more_of_k(backward):
    def changed(*args):
        grads = backward(*args)
        return grads._replace(k=grads.k * (1 + 1e-6))

    return changed


def put_in_place(monkeypatch, backward):
    """``backward`` as the chunked path's."""
    monkeypatch.setitem(PATHS, "chunked", PATHS["chunked"]._replace(backward=backward))


@pytest.mark.parametrize("mutate", [forget_rho, forget_causality, slightly_more_of_k])
def test_a_wrong_backward_is_caught(monkeypatch, mutate):
    case = make_case(length=9, layout="position")
    assert_gradients_equal_the_reference(case)
    put_in_place(monkeypatch, mutate(chunked.backward))
    with pytest.raises(AssertionError, match="gradient"):
        assert_gradients_equal_the_reference(case)


def test_gradcheck_catches_a_wrong_backward(monkeypatch):
    put_in_place(monkeypatch, forget_rho(chunked.backward))
    with pytest.raises(GradcheckError):
        gradcheck(make_case(length=4, heads=1, qk=2, v=2, ranks=(1, 1)), "chunked")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("asked", ["q", "k", "v", "routing.down", "routing.core", "readout.diag", "readout.up"])
def test_one_gradient_alone_equals_it_among_all(backend, asked):
    """Each stops the backward at another place."""
    case = make_case(length=9)
    everything = evaluate(case, lambda c: c.run(backend)).named()
    generator = torch.Generator().manual_seed(99)
    x = case.tensors[asked].clone().requires_grad_()
    with tiles(4):
        o = case.with_tensors({asked: x}).run(backend)
        weight = torch.randn(o.shape, generator=generator, dtype=torch.float64)
        (alone,) = torch.autograd.grad(o, x, weight)
    assert_close({"gradient": alone}, {"gradient": everything[f"gradient of {asked}"]})


def test_a_gradient_not_asked_for_is_not_computed(monkeypatch):
    made = []

    def spy(*args):
        made.append(chunked.backward(*args))
        return made[-1]

    put_in_place(monkeypatch, spy)
    case = make_case(length=9)
    frozen = {"routing.diag", "routing.up", "readout.down", "v"}
    inputs = {n: x.clone().requires_grad_(n not in frozen) for n, x in case.tensors.items()}
    Case(inputs, case.options).run("chunked").sum().backward()
    order = ["q", "k", "v"] + [f"{m}.{f}" for m in ("routing", "readout") for f in ("diag", "down", "up", "core")]
    (grads,) = made
    assert [n for n, g in zip(order, grads.flat, strict=True) if g is None] == [n for n in order if n in frozen]
    assert all((inputs[n].grad is None) == (n in frozen) for n in order)
