"""torch.func transforms, forward mode and higher derivatives: right, or a clear error."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from tests.helpers import BACKENDS, assert_close, make_case, tiles

CASE = make_case(length=4, heads=1, qk=2, v=2, ranks=(1, 1))


def loss(backend: str, name: str = "q"):
    return lambda x: CASE.with_tensors({name: x}).run(backend).square().sum()


def by_autograd(name: str) -> torch.Tensor:
    x = CASE.tensors[name].clone().requires_grad_()
    return torch.autograd.grad(loss("reference", name)(x), x)[0]


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("name", ["q", "v", "routing.down"])
def test_func_grad_and_jvp(backend, name):
    x, tangent = CASE.tensors[name], torch.randn_like(CASE.tensors[name])
    expected = by_autograd(name)
    assert_close({"g": torch.func.grad(loss(backend, name))(x)}, {"g": expected})
    _, along = torch.func.jvp(loss(backend, name), (x,), (tangent,))
    assert_close({"jvp": along}, {"jvp": (expected * tangent).sum()})
    assert along.abs() > 1e-3


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_forward_mode_outside_func(backend):
    x, tangent = CASE.tensors["q"], torch.randn_like(CASE.tensors["q"])
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(loss(backend)(forward_ad.make_dual(x, tangent)))
        assert_close({"jvp": out.tangent}, {"jvp": (by_autograd("q") * tangent).sum()})


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_vmap_and_per_sample_gradients(backend):
    xs = torch.stack([CASE.tensors["q"] * s for s in (1.0, 0.5, -2.0)])
    values = torch.func.vmap(loss(backend))(xs)
    assert_close({"v": values}, {"v": torch.stack([loss("reference")(x) for x in xs])})
    grads = torch.func.vmap(torch.func.grad(loss(backend)))(xs)
    assert_close({"g": grads}, {"g": torch.stack([torch.func.grad(loss("reference"))(x) for x in xs])})


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_hessian(backend):
    x = CASE.tensors["q"]
    hessian = torch.func.hessian(loss(backend))(x)
    step, direction = 1e-5, torch.randn_like(x)
    grad = torch.func.grad(loss("reference"))
    numeric = (grad(x + step * direction) - grad(x - step * direction)) / (2 * step)
    product = (hessian.reshape(x.numel(), -1) @ direction.flatten()).reshape(x.shape)
    assert_close({"Hv": product}, {"Hv": numeric}, rtol=1e-5)
    assert product.abs().max() > 1e-2


def test_double_backward_through_chunked_is_a_clear_error():
    x = CASE.tensors["q"].clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss("chunked")(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="backend=.reference."):
        grad.square().sum().backward()


def test_double_backward_through_the_reference_equals_finite_differences():
    def penalty(x: torch.Tensor) -> torch.Tensor:
        (grad,) = torch.autograd.grad(loss("reference")(x), x, create_graph=True)
        return grad.square().sum()

    assert torch.autograd.gradcheck(penalty, CASE.tensors["q"].clone().requires_grad_())


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_left_unchanged(backend):
    case = make_case(length=9).map(lambda x: x.requires_grad_())
    before = {name: (x.detach().clone(), x._version) for name, x in case.tensors.items()}
    o = case.run(backend)
    weight = torch.randn_like(o)
    kept = weight.clone()
    o.backward(weight)
    assert torch.equal(weight, kept)
    for name, x in case.tensors.items():
        assert torch.equal(x, before[name][0]), name
        assert x._version == before[name][1], name


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_order_changes_nothing(backend):
    from tests.helpers import evaluate

    case = make_case(length=9, batch=2)

    def strided(x: torch.Tensor) -> torch.Tensor:
        """Every other element of a larger tensor, dimensions reversed in memory."""
        dims = tuple(reversed(range(x.ndim)))
        big = torch.full((*x.permute(dims).shape, 2), float("nan"), dtype=x.dtype)
        big[..., 0] = x.permute(dims)
        return big[..., 0].permute(dims)

    def run(c):
        with tiles(4):
            return c.with_tensors({n: strided(x) for n, x in c.tensors.items()}).run(backend)

    assert_close(evaluate(case, run).named(), evaluate(case, lambda c: c.run(backend)).named())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["expanded", "strided"])
def test_an_incoming_gradient_of_any_memory_order(backend, kind):
    case = make_case(length=9, batch=2).map(lambda x: x.requires_grad_())
    o = case.run(backend)
    weight = torch.ones(()).double().expand_as(o) if kind == "expanded" else torch.randn(*o.shape, 2).double()[..., 0]
    inputs = list(case.tensors.values())
    plain = torch.autograd.grad(o, inputs, weight.contiguous(), retain_graph=True)
    for x, y in zip(torch.autograd.grad(o, inputs, weight), plain, strict=True):
        torch.testing.assert_close(x, y)
