"""What goes wrong in the authors' code must not go wrong here: one test for each fault."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from hypermlp import HyperGLU
from tests import golden

BACKENDS = ("reference", "chunked")


def gradients(layer: nn.Module, x: Tensor, w: Tensor, *inputs: Tensor) -> dict[str, Tensor]:
    layer.zero_grad()
    x = x.clone().requires_grad_()
    (layer(x, *inputs) * w).sum().backward()
    return {"x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_under_bfloat16_autocast(backend: str) -> None:
    """Theirs raises. Ours is near the recorded float64 gradients, in a case whose rows are well conditioned."""
    case = golden.load("s19")
    layer = case.layer(torch.float32, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        grads = gradients(layer, case.x, case.w)
    for name, expected in {"x": case.grad_x, **case.our_grads()}.items():
        assert grads[name].dtype == torch.float32
        assert (grads[name] - expected).norm() < 0.05 * expected.norm(), name


def test_double_backward_of_the_reference_is_right() -> None:
    """Theirs is silently 29 % off. Against central differences of the gradient, with every parameter live."""
    case = golden.load("s03")
    layer = case.layer(backend="reference")
    generator = torch.Generator().manual_seed(0)
    x, w = case.x.double()[:, :12], case.w.double()[:, :12]
    names = [name for name, _ in layer.named_parameters()]
    values = {"x": x, **{name: p.detach() for name, p in layer.named_parameters()}}
    direction = {k: torch.randn(v.shape, dtype=v.dtype, generator=generator) for k, v in values.items()}
    probe = {k: torch.randn(v.shape, dtype=v.dtype, generator=generator) for k, v in values.items()}

    def probed_gradient(point: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        point = {k: v.clone().requires_grad_() for k, v in point.items()}
        y = torch.func.functional_call(layer, {name: point[name] for name in names}, (point["x"],))
        grads = torch.autograd.grad((y * w).sum(), list(point.values()), create_graph=True)
        return sum((g * probe[k]).sum() for k, g in zip(point, grads, strict=True)), point

    value, point = probed_gradient(values)
    second = torch.autograd.grad(value, list(point.values()))
    along = sum((g * direction[k]).sum() for k, g in zip(point, second, strict=True))
    step = 1e-6
    ahead, behind = (
        probed_gradient({k: v + s * direction[k] for k, v in values.items()})[0].detach() for s in (step, -step)
    )
    assert torch.allclose(along, (ahead - behind) / (2 * step), rtol=1e-5)


def test_double_backward_of_the_chunked_path_is_an_error() -> None:
    case = golden.load("s03")
    x = case.x.double().requires_grad_()
    (grad,) = torch.autograd.grad(case.layer(backend="chunked")(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_with_a_fully_masked_row(backend: str) -> None:
    """Theirs is NaN: its eps is zero in float16."""
    case = golden.load("s01")
    layer = case.layer(torch.float16, backend=backend)
    mask = torch.ones(case.x.shape[:2], dtype=torch.bool)
    mask[0] = False
    mask[1, :5] = False
    x = case.x.half()
    assert (layer(x, mask)[~mask] == 0).all()
    for name, grad in gradients(layer, x, case.w.half(), mask).items():
        assert torch.isfinite(grad).all(), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nan_stays_in_its_own_and_later_rows(backend: str, bad: float) -> None:
    """Theirs reaches the earlier rows of its chunk."""
    case = golden.load("s01")
    layer = case.layer(torch.float32, backend=backend)
    x = case.x.clone()
    x[0, 25, 3] = bad
    y, clean = layer(x).detach(), layer(case.x).detach()
    assert golden.relative_error(y[0, :25], clean[0, :25]) < 1e-6
    assert golden.relative_error(y[1], clean[1]) < 1e-6
    assert not torch.isfinite(y[0, 25:]).all(dim=-1).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_longer_sequence_is_a_window(backend: str) -> None:
    """Theirs asserts. Every output is that of a run over the last ``max_lag`` tokens and the convolution's reach."""
    case = golden.load("s01")
    layer = case.layer(backend=backend)
    max_lag, reach = 32, 3
    x = torch.cat([case.x, -case.x.flip(1), case.x.roll(5, dims=1)], dim=1).double()
    y = layer(x).detach()
    assert torch.allclose(y[:, :32], layer(x[:, :32]), atol=1e-12)
    for i in (32, 33, 50, 95):
        alone = layer(x[:, max(0, i + 1 - max_lag - reach) : i + 1])[:, -1]
        assert torch.allclose(y[:, i], alone, atol=1e-12), i
        narrower = layer(x[:, i + 2 - max_lag : i + 1])[:, -1]
        assert not torch.allclose(y[:, i], narrower, atol=1e-6), i


def test_no_recompilation_for_every_length() -> None:
    """The first length makes one graph and the second a dynamic one, which serves all others, window or not."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = HyperGLU(32, max_lag=64, backend="chunked")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for length in (9, 16, 17, 40, 64, 65, 150):
        x = torch.randn(2, length, 32)
        y = compiled(x)
        assert torch.allclose(y, layer(x), atol=1e-5)
        y.sum().backward()
    assert counter.frame_count == 2
    torch.compiler.reset()


def test_convolutions_start_near_the_identity() -> None:
    """Theirs start near zero, which makes the whole layer about 34 times quieter."""

    def scale(**options: object) -> float:
        torch.manual_seed(0)
        return HyperGLU(128, max_lag=128, **options)(x).std().item()

    x = torch.randn(2, 128, 128, generator=torch.Generator().manual_seed(1))
    layer = HyperGLU(128, max_lag=128)
    for conv in (layer.k_conv, layer.v_conv):
        assert (conv(x) - x).norm() < 0.1 * x.norm()
    assert 0.8 < scale() / scale(conv_size=0) < 1.25
    assert scale(conv_init="paper") / scale(conv_size=0) < 0.1


def saved_bytes(backend: str, length: int) -> int:
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    layer = HyperGLU(16, max_lag=1024, mix_rank=2, backend=backend)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        layer(torch.randn(1, length, 16))
    return sum(storages.values())


def test_what_is_kept_for_backward_grows_with_the_length() -> None:
    """Theirs keeps maps of T x T, as our reference does."""
    growth = {backend: saved_bytes(backend, 1024) / saved_bytes(backend, 512) for backend in BACKENDS}
    assert growth["chunked"] < 2.1
    assert growth["reference"] > 3
