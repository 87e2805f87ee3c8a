"""``hypermlp::triton_forward`` as an operator of PyTorch, in Triton's interpreter."""

import pytest
import repairs
import torch
from torch.utils.flop_counter import FlopCounterMode

from hypermlp import HyperGLU
from hypermlp.ops import SequenceMix, hyper_attention
from hypermlp.ops.library import PATHS
from hypermlp_kernels import launch, launch_backward
from tests.helpers import make_case

repairs.repair()
pytestmark = pytest.mark.skipif(not launch.interpreted(), reason="needs TRITON_INTERPRET=1 before triton is imported")
T, H, V, L = 18, 1, 4, 20


def inputs(dtype: torch.dtype = torch.float64, batch: int = 1) -> list[torch.Tensor]:
    """q, k, v, then diag, down, up and gate of both mixings, all with gradients."""
    case = make_case(batch=batch, length=T, heads=H, qk=4, v=V, ranks=(2, 2), max_lag=L)
    return [(0.5 * x).to(dtype).requires_grad_() for x in case.tensors.values()]


def attend(tensors: list[torch.Tensor], backend: str = "triton", **options) -> torch.Tensor:
    mixes = SequenceMix(*tensors[3:7]), SequenceMix(*tensors[7:11])
    return hyper_attention(*tensors[:3], *mixes, backend=backend, **options)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_the_other_paths(masked: bool) -> None:
    tensors = inputs(batch=1 + masked)
    mask = None
    if masked:
        mask = torch.ones(2, T, dtype=torch.bool)
        mask[0, :3] = mask[1, 9] = False
    weight = torch.randn(1 + masked, T, H, V, dtype=torch.float64)
    expected = attend(tensors, "reference", attention_mask=mask)
    actual = attend(tensors, attention_mask=mask)
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-8)
    expected = torch.autograd.grad((expected * weight).sum(), tensors)
    actual = torch.autograd.grad((actual * weight).sum(), tensors)
    for gradient, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", ["triton", "chunked"])
def test_the_gradient_is_of_the_path_that_was_taken(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """The kernels' forward is differentiated by the kernels, and only that."""
    ran = []
    kernels, chunked = launch_backward.backward, PATHS["chunked"]
    monkeypatch.setattr(launch_backward, "backward", lambda *args, **kw: ran.append("triton") or kernels(*args, **kw))
    spied = chunked._replace(backward=lambda *args: ran.append("chunked") or chunked.backward(*args))
    monkeypatch.setitem(PATHS, "chunked", spied)
    attend(inputs(), backend).sum().backward()
    assert ran == [backend]


def test_opcheck_of_the_backward() -> None:
    arguments = (*inputs(), None, None, True, True, "glu", True, 1e-12, True, "lag", L)
    arguments = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)
    output = torch.ops.hypermlp.triton_forward(*arguments)
    needs = [True, False, True, False, True, False, True, True, False, True, True]
    torch.library.opcheck(
        torch.ops.hypermlp.triton_backward.default,
        (torch.ones_like(output[0]), *output, needs, *arguments),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_a_second_derivative_is_refused_with_the_remedy() -> None:
    tensors = inputs()
    (grad,) = torch.autograd.grad(attend(tensors).sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"the triton path .* backend='reference'"):
        grad.sum().backward()


def test_opcheck() -> None:
    arguments = (*inputs(), None, None, True, True, "glu", True, 1e-12, True, "lag", L)
    torch.library.opcheck(torch.ops.hypermlp.triton_forward.default, arguments, atol=1e-6, rtol=1e-6)


def test_compiles_to_one_graph() -> None:
    tensors = inputs(torch.float32)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    actual, expected = compiled(tensors), attend(tensors)
    torch.testing.assert_close(actual, expected)
    actual, expected = (torch.autograd.grad(o.square().sum(), tensors) for o in (actual, expected))
    torch.testing.assert_close(actual, expected)


def test_autocast() -> None:
    tensors = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        o = attend(tensors)
    assert o.dtype == torch.bfloat16
    torch.testing.assert_close(o.float(), attend(tensors, "reference"), rtol=0.05, atol=0.05)


def test_flops_are_those_of_the_chunked_path() -> None:
    counted = []
    for backend in ("triton", "chunked"):
        with FlopCounterMode(display=False) as counter:
            attend(inputs(torch.float32), backend).sum().backward()
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


def test_layer() -> None:
    torch.manual_seed(0)
    layer = HyperGLU(16, mix_rank=3, max_lag=12, backend="triton", dtype=torch.float64)
    x = torch.randn(1, T, 16, dtype=torch.float64)
    y = layer(x)
    layer.backend = "reference"
    torch.testing.assert_close(y, layer(x), rtol=1e-6, atol=1e-8)
