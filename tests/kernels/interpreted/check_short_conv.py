"""The short convolution's kernels in Triton's interpreter against autograd through PyTorch's operators in float64.

Not collected by name: ``tests/kernels/test_interpreted.py`` runs this file in a process of its own.
"""

from functools import partial
from typing import Any

import pytest
import repairs
import torch
from conv_cases import CASES, HALVES, Conv
from torch import Tensor

from hypermlp import HyperCache, HyperGLU, SoftmaxAttention
from hypermlp.layers.short_conv import ShortConv
from hypermlp.ops import short_conv as functional
from hypermlp.ops.short_conv import short_conv
from hypermlp_kernels import launch, launch_short_conv

repairs.repair()
pytestmark = pytest.mark.skipif(not launch.interpreted(), reason="needs TRITON_INTERPRET=1 before triton is imported")


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel must write starts as NaN."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        made = empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str) -> None:
    case = CASES[name]
    tensors = case.tensors()
    for ours, exact in zip(case.run("triton", tensors), case.run("reference", tensors), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("options", [{}, {"past": True}, {"B": 1, "bounds": (0, 1, 3, 17, 65)}], ids=str)
def test_low_precision_is_no_worse_than_twice_pytorchs(options: dict, dtype: torch.dtype) -> None:
    case = Conv(T=65, dtype=dtype, **options)
    tensors = case.tensors()
    exact = case.run("reference", [x.double() for x in tensors])
    for ours, plain, truth in zip(case.run("triton", tensors), case.run("reference", tensors), exact, strict=True):
        assert ours.dtype == plain.dtype == dtype
        made, allowed = ((x.double() - truth).abs().max() for x in (ours, plain))
        assert made <= 2 * allowed


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)])
def test_what_is_not_asked_for_is_not_computed(wanted: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    case, seen, backward = Conv(T=20), [], launch_short_conv.backward
    monkeypatch.setattr(
        launch_short_conv, "backward", lambda *args, **kwargs: seen.append(backward(*args, **kwargs)) or seen[-1]
    )
    exact = case.run("reference", case.tensors())[1:]
    tensors = [x.requires_grad_(need) for x, need in zip(case.tensors(), wanted, strict=True)]
    y = short_conv(*tensors, backend="triton")
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y.backward(weight)
    assert tuple(grad is not None for grad in seen[0]) == wanted
    for x, need, grad in zip(tensors, wanted, exact, strict=True):
        assert (x.grad is not None) == need
        if need:
            torch.testing.assert_close(x.grad, grad)


def test_without_a_gradient_nothing_is_kept() -> None:
    x, taps = Conv().tensors()
    y = short_conv(x, taps, backend="triton")
    assert not y.requires_grad
    torch.testing.assert_close(y, short_conv(x, taps))


@pytest.mark.parametrize("token", [2, 16])
def test_a_nan_stays_in_its_sequence(token: int) -> None:
    """Values and gradients: beside it in the tile lie tokens of others, and of the next batch row."""
    bounds = (0, 3, 17, 40)
    for case in (Conv(B=1, bounds=bounds, dtype=torch.float32), Conv(dtype=torch.float32)):
        tensors = case.tensors()
        tensors[0][0, token] = float("nan")
        y, _, grad_taps = case.run("reference", tensors)
        assert y.isnan().any(2).sum() in (1, 4)
        assert grad_taps.isnan().any()
        for ours, exact in zip(case.run("triton", tensors), case.run("reference", tensors), strict=True):
            torch.testing.assert_close(ours, exact, equal_nan=True)


@pytest.mark.parametrize(("x", "taps"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_mixed_dtypes_promote_as_pytorch_does(x: torch.dtype, taps: torch.dtype) -> None:
    """A float32 parameter and a low-precision input, as autocast has them."""
    case = Conv(T=20)
    tensors = [tensor.to(dtype) for tensor, dtype in zip(case.tensors(), (x, taps), strict=True)]
    exact = case.run("reference", [tensor.double() for tensor in tensors])
    with torch.autocast("cpu", torch.bfloat16):
        both = [case.run(backend, tensors) for backend in ("triton", "reference")]
    for ours, plain, truth in zip(*both, exact, strict=True):
        assert ours.dtype == plain.dtype
        assert (ours - truth).abs().max() <= 2 * (plain - truth).abs().max() + 1e-6


@pytest.mark.parametrize("name", ["T65", "packed"])
def test_same_bits_every_run(name: str) -> None:
    case = CASES[name]
    for one, other in zip(*(case.run("triton", case.tensors()) for _ in range(2)), strict=True):
        assert torch.equal(one, other)


def test_opcheck() -> None:
    x, taps = (tensor.requires_grad_() for tensor in Conv(B=1, T=7, D=3).tensors())
    bounds = torch.tensor([0, 3, 7])
    for arguments in ((x, taps, None, 0), (x, taps, None, 3), (x, taps, bounds, 0)):
        torch.library.opcheck(torch.ops.hypermlp.triton_short_conv.default, arguments)
    arguments = (x.detach(), x.detach(), taps.detach(), bounds, 0)
    for needs in ([True, True], [False, True], [True, False]):
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(
            torch.ops.hypermlp.triton_short_conv_backward.default, (*arguments, needs), test_utils=checks
        )


def test_compiles_to_one_graph() -> None:
    def convolve(x: Tensor, taps: Tensor) -> Tensor:
        return short_conv(x, taps, backend="triton")

    tensors = [x.requires_grad_() for x in Conv().tensors()]
    ys = torch.compile(convolve, backend="aot_eager", fullgraph=True)(*tensors), convolve(*tensors)
    torch.testing.assert_close(*ys)
    for one, other in zip(*(torch.autograd.grad(y.square().sum(), tensors) for y in ys), strict=True):
        torch.testing.assert_close(one, other)


def test_second_derivatives_are_those_of_the_reference() -> None:
    x, taps = (tensor.requires_grad_() for tensor in Conv().tensors())
    both = []
    for backend in ("triton", "reference"):
        (grad,) = torch.autograd.grad(short_conv(x, taps, backend=backend).square().sum(), x, create_graph=True)
        both.append(torch.autograd.grad(grad.square().sum(), [x, taps]))
    for ours, exact in zip(*both, strict=True):
        torch.testing.assert_close(ours, exact)


def test_a_transform_takes_pytorchs_operators() -> None:
    x, taps = Conv(T=5).tensors()
    ours = torch.func.vmap(lambda row: short_conv(row[None], taps, backend="triton")[0])(x)
    torch.testing.assert_close(ours, short_conv(x, taps))


def hyperglu(**options: object) -> HyperGLU:
    return HyperGLU(12, mix_rank=3, max_lag=20, **options)


LAYERS = {
    "plain": (hyperglu, {}),
    "softmax": (partial(SoftmaxAttention, 12, conv_size=3), {}),
    "no-convolution": (partial(hyperglu, conv_size=0), {}),
    "packed": (hyperglu, {"cu_seqlens": [0, 5, 18]}),
    "padded": (hyperglu, {"attention_mask": [[0] * 3 + [1] * 15]}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and every gradient, through the kernel for both convolutions."""
    build, options = LAYERS[name]
    launched, kernels = [], launch_short_conv.forward
    monkeypatch.setattr(launch_short_conv, "forward", lambda *a, **kw: launched.append(1) or kernels(*a, **kw))
    torch.manual_seed(0)
    layer = build(backend="triton", dtype=torch.float64)
    x = torch.randn(1, 18, 12, dtype=torch.float64, requires_grad=True)
    options = {key: torch.tensor(value) for key, value in options.items()}
    found = []
    for backend in ("triton", "reference"):
        layer.backend = backend
        y = layer(x, **options)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    assert len(launched) == (0 if name == "no-convolution" else 2)
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-7)


def test_a_layer_with_a_cache() -> None:
    """A prompt, a block and a token: the block's convolutions read the tokens before it."""
    torch.manual_seed(0)
    layer = HyperGLU(12, mix_rank=3, max_lag=20, layer_idx=0, backend="triton", dtype=torch.float64)
    layer.requires_grad_(False)
    x, cache = torch.randn(2, 12, 12, dtype=torch.float64), HyperCache()
    parts = torch.cat([layer(part, cache=cache) for part in x.split((6, 5, 1), dim=1)], 1)
    layer.backend = "reference"
    torch.testing.assert_close(parts, layer(x), rtol=1e-6, atol=1e-8)


def test_hooks_and_replaced_forwards_are_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = HyperGLU(12, max_lag=20, backend="triton"), torch.randn(1, 5, 12)
    seen: list[Tensor] = []
    layer.k_conv.register_forward_hook(lambda module, args, y: seen.append(y))
    layer.v_conv.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    monkeypatch.setattr(layer.k_conv, "forward", lambda x, **others: 3 * x)
    k, v = layer.keys_values(x)
    torch.testing.assert_close(seen[0], 3 * x)
    torch.testing.assert_close(k.flatten(-2), layer.k_proj(3 * x))
    torch.testing.assert_close(v.flatten(-2), layer.v_proj(short_conv(2 * x, layer.v_conv.taps)))


def test_taps_made_by_a_subclass_are_used_and_get_their_gradient() -> None:
    class Doubled(ShortConv):
        @property
        def taps(self) -> Tensor:
            return 2 * self.weight

    conv, x = Doubled(3, 4), torch.randn(1, 8, 3)
    both = []
    for backend in ("triton", "auto"):
        y = conv(x, backend=backend)
        both.append([y, *torch.autograd.grad(y.square().sum(), conv.weight)])
    for ours, exact in zip(*both, strict=True):
        torch.testing.assert_close(ours, exact)


def test_only_triton_takes_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("the kernel was taken")

    monkeypatch.setitem(functional._FUSED, "triton", refuse)
    x, taps = Conv(T=3).tensors()
    for backend in ("auto", "reference", "chunked"):
        short_conv(x, taps, backend=backend)
    with pytest.raises(AssertionError):
        short_conv(x, taps, backend="triton")
