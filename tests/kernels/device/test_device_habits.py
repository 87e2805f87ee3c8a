"""What surrounds a kernel: strides, alignment, values that are not finite, autocast, compilation."""

import sys
import warnings
from collections.abc import Callable

import pytest
import torch
from place import CASES, DEVICE, ON_GPU, Case, measure_of, moved, operator_case
from torch import Tensor, nn

from hypermlp import HyperGLU
from hypermlp.budget import count_norm_kept
from hypermlp.ops import hyper_attention
from tests.helpers import assert_close_to_reference
from tests.kept import kept_bytes

gpu_alone = pytest.mark.skipif(not ON_GPU, reason="the interpreter compiles nothing")


def beside_others(x: Tensor) -> Tensor:
    """In the first half of wider rows."""
    return torch.cat([x, torch.full_like(x, float("nan"))], -1)[..., : x.shape[-1]]


def strided_last(x: Tensor) -> Tensor:
    """Every second number of a row."""
    return torch.stack([x, torch.full_like(x, float("nan"))], -1)[..., 0]


def unaligned(x: Tensor) -> Tensor:
    """One number past an aligned address: a load as wide as of aligned data would fault."""
    return torch.cat([x.new_full((1,), float("nan")), x.reshape(-1)])[1:].view(x.shape)


def heads_first(x: Tensor) -> Tensor:
    """Strides of a tensor whose second and third axis were swapped."""
    return x if x.ndim < 3 else x.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("change", [beside_others, strided_last, unaligned, heads_first])
@pytest.mark.parametrize("selection", ["glu", "relu"])
def test_any_strides(selection: str, change: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    case, _ = operator_case(Case(T=70, B=2, H=2, K=16, V=32, R=(16, 16), selection=selection), dtype)
    assert_close_to_reference(case, lambda c: c.map(change).run("triton"), measure_of(dtype))


def test_expanded_batch() -> None:
    """One sequence for the whole batch, with a stride of zero."""
    case, _ = operator_case(Case(T=40, H=2), torch.bfloat16)
    alone = case.run("triton")
    streams = {n: x.expand(3, *x.shape[1:]) for n, x in case.tensors.items() if x.ndim == 4}
    together = case.with_tensors(streams).run("triton")
    assert all(torch.equal(row, alone[0]) for row in together)


@pytest.mark.parametrize("stream", ["q", "k", "v"])
@pytest.mark.parametrize("layout", ["lag", "position"])
def test_nonfinite_reaches_its_rows_alone(stream: str, layout: str) -> None:
    window = 10 if layout == "lag" else 40
    case = moved(Case(rows=window, layout=layout), torch.bfloat16)
    clean = case.kernels()[0]
    getattr(case, stream)[:, 21, 0, 1] = float("inf") if stream == "v" else float("nan")
    o = case.kernels()[0]
    seen = torch.zeros(case.T, dtype=torch.bool)
    seen[21 : 22 if stream == "q" else 21 + window] = True
    assert not torch.isfinite(o[:, seen]).any()
    assert torch.equal(o[:, ~seen], clean[:, ~seen])


def test_autocast_is_the_cast() -> None:
    case, _ = operator_case(CASES["T65"], torch.float32)
    low = case.map(lambda x: x.bfloat16() if x.ndim == 4 else x)
    with torch.autocast(DEVICE, torch.bfloat16):
        o = case.run("triton")
    assert o.dtype == torch.bfloat16
    assert torch.equal(o, low.run("triton"))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_trains(autocast: bool) -> None:
    """Float32 parameters, with and without autocast: gradients near those of the reference, all of them finite."""
    torch.manual_seed(0)
    layer = HyperGLU(64, mix_rank=4, max_lag=50, backend="triton").to(DEVICE)
    x = torch.randn(2, 70, 64, device=DEVICE)
    found = []
    for backend in ("triton", "reference"):
        layer.backend = backend
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            out = layer(x)
        found.append([out, *torch.autograd.grad(out.float().square().sum(), list(layer.parameters()))])
    for ours, exact in zip(*found, strict=True):
        distance = (ours.float() - exact.float()).norm() / exact.float().norm().clamp_min(1e-12)
        assert distance < (5e-2 if autocast else 1e-4)


@gpu_alone
def test_compiles_to_one_graph_with_its_gradient() -> None:
    case, _ = operator_case(Case(T=130, H=2, K=16, V=32), torch.bfloat16)
    tensors = [x.requires_grad_() for x in case.tensors.values()]
    mixes = case.mixes()

    def attend() -> Tensor:
        return hyper_attention(*tensors[:3], *mixes, backend="triton")

    eager, compiled = attend(), torch.compile(attend, fullgraph=True)()
    torch.testing.assert_close(compiled, eager)
    weight = torch.randn_like(eager)
    for one, other in zip(*(torch.autograd.grad(o, tensors, weight) for o in (eager, compiled)), strict=True):
        torch.testing.assert_close(one, other)


@gpu_alone
def test_a_compiled_layer_does_not_compile_again_for_a_third_length() -> None:
    layer = HyperGLU(64, max_lag=300, backend="triton").to(DEVICE, torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        for length in (100, 150):
            compiled(torch.randn(1, length, 64, device=DEVICE, dtype=torch.bfloat16))
        with torch.compiler.set_stance("fail_on_recompile"):
            x = torch.randn(1, 213, 64, device=DEVICE, dtype=torch.bfloat16)
            torch.testing.assert_close(compiled(x), layer(x), rtol=2e-2, atol=2e-2)


def compiled_kernels() -> int:
    """How many binaries Triton holds for the kernels of this project."""
    import triton

    kernels = {
        id(value): value
        for name, module in list(sys.modules.items())
        if name.startswith("hypermlp_kernels")
        for value in vars(module).values()
        if isinstance(value, triton.JITFunction)
    }
    return sum(len(cache[0]) for kernel in kernels.values() for cache in kernel.device_caches.values())


@gpu_alone
def test_lengths_share_their_kernels() -> None:
    """Where strides are multiples of 16 at every length: Triton compiles for that as well."""

    def attend(length: int) -> None:
        case, _ = operator_case(Case(T=length, H=2, K=16, V=48, R=(16, 16), rows=300), torch.bfloat16)
        streams = {n: x.requires_grad_() for n, x in case.tensors.items()}
        case.with_tensors(streams).run("triton").float().sum().backward()

    attend(70)
    before = compiled_kernels()
    assert before
    for length in (1, 16, 17, 200, 256):
        attend(length)
    assert compiled_kernels() == before


@gpu_alone
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_auto_takes_the_kernels_once_checked(dtype: torch.dtype) -> None:
    """The backward asks in the thread that serves autograd on the device, which the check must not wait for."""
    case, _ = operator_case(Case(T=130, H=2, K=16, V=32), dtype)
    tensors = [x.requires_grad_() for x in case.tensors.values()]
    weight = torch.randn_like(case.tensors["v"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [torch.autograd.grad(case.run(backend), tensors, weight) for backend in ("auto", "triton")]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@gpu_alone
def test_auto_in_graphs() -> None:
    """Checked where a compiled graph first runs; in a recorded one trusted after that, which is a warm-up."""
    case, _ = operator_case(Case(T=130, H=2, K=16, V=64), torch.float16)
    tensors = list(case.tensors.values())
    mixes = case.mixes()

    def attend() -> Tensor:
        return hyper_attention(*tensors[:3], *mixes)

    def recorded() -> Tensor:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o = attend()
        graph.replay()
        torch.cuda.synchronize()
        return o

    kernels = case.run("triton")
    assert torch.equal(torch.compile(attend, fullgraph=True)(), kernels)
    assert torch.equal(recorded(), kernels)


@gpu_alone
def test_a_fused_norm_keeps_its_input_and_a_number() -> None:
    """What ``hypermlp plan`` counts on; on a CPU the norm is not fused."""
    norm = nn.RMSNorm(32, dtype=torch.bfloat16, device=DEVICE)
    x = torch.randn(2, 12, 32, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    assert kept_bytes(norm, x) == count_norm_kept(32, 24)
