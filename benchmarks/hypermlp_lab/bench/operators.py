"""Operators without projections: HyperGLU's paths and PyTorch's attention at equal width."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hypermlp.ops import SequenceMix, hyper_attention
from hypermlp.ops.flops import backward_flops, forward_flops, visible_pairs
from hypermlp_lab.bench.clock import HostClock
from hypermlp_lab.bench.gate import Errors, compare
from hypermlp_lab.bench.layers import LayerCase, dense_softmax, reference_bytes
from hypermlp_lab.bench.measure import extra_peak_bytes, out_of_memory, quartiles
from hypermlp_lab.bench.run import Benchmark, Prepared
from hypermlp_lab.bench.settings import Provider

Call = Callable[[list[Tensor]], Tensor]
_MAPS = 2  # HyperGLU's score maps of a head
# the longest that is launched from a CUDA graph, where the operator allows it
_GRAPH_LENGTH = 8192
_CEILING_ROUNDS = 30


@dataclass(frozen=True, kw_only=True)
class OperatorCase(LayerCase):
    """One size to measure; all operators have values of ``hidden_size`` in total.

    Attributes:
        mix_rank: rank of both sequence mixings.
        head_width: of a softmax head: they have ``hidden_size / head_width`` heads.
    """

    hidden_size: int = 1024
    batch: int = 4
    mix_rank: int = 16
    head_width: int = 64

    @property
    def score_width(self) -> int:
        """``K``: the layer's default, a quarter of the width over all score maps."""
        return self.hidden_size // (4 * _MAPS * self.num_heads)

    @property
    def pairs(self) -> int:
        """Query-key pairs of the batch."""
        return self.batch * visible_pairs(self.length)


@dataclass(frozen=True, kw_only=True)
class OperatorProvider(Provider):
    """An operator to measure.

    Attributes:
        inputs: random inputs for a case, streams ``[B, T, heads, width]`` first.
        build: the call for a case, compiled or prepared as its users would.
        exact: the same function computed another way, for the gate.
        flops: of one call in a mode: products of matrices, each recomputed map of a backward counted once.
        graph: whether a CUDA graph may hold it: no waiting for the device, a moderate number of kernels.
    """

    inputs: Callable[[OperatorCase], list[Tensor]]
    build: Callable[[OperatorCase], Call]
    exact: Call
    flops: Callable[[OperatorCase, str], int]
    graph: bool = True


class OperatorBenchmark(Benchmark[OperatorProvider, OperatorCase]):
    """Forward and forward+backward of operators; one that fails at a length leaves the others."""

    name = "operators"
    tolerant = True

    @property
    def timing(self) -> str:  # type: ignore[override]
        return self.clock.how

    def facts(self) -> dict[str, Any]:
        self.ceilings = ceilings(self.clock, self.settings.cases[0])
        return {"ceilings": self.ceilings}

    def errors(self, provider: OperatorProvider, case: OperatorCase) -> Errors:
        """Of the output and, where a backward is measured, of the gradient of every input."""
        inputs, gradients = provider.inputs(case), self.settings.modes != ("forward",)

        def evaluate(exact_in: torch.dtype | None) -> dict[str, Tensor]:
            call = provider.build(case) if exact_in is None else provider.exact
            tensors = [x.detach().to(exact_in or case.dtype).requires_grad_(gradients) for x in inputs]
            output = call(tensors)
            found = {"output": output.detach()}
            if gradients:
                pull = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
                grads = torch.autograd.grad(output, tensors, pull.to(case.dtype).to(output.dtype))
                found |= {f"gradient of input {index}": grad for index, grad in enumerate(grads)}
            return found

        with torch.set_grad_enabled(gradients):
            return compare(evaluate, case.dtype)

    def prepare(self, provider: OperatorProvider, case: OperatorCase, mode: str) -> Prepared:
        backward = mode != "forward"
        tensors = [x.requires_grad_(backward) for x in provider.inputs(case)]
        operator = provider.build(case)
        with torch.set_grad_enabled(backward):
            # compiled before memory is measured
            output = operator(tensors).detach()
        pull, output_bytes = torch.randn_like(output), output.nbytes
        del output

        def call() -> object:
            with torch.set_grad_enabled(backward):
                output = operator(tensors)
                return torch.autograd.grad(output, tensors, pull) if backward else output

        if backward:
            call()
        peak = extra_peak_bytes(call, self.device)
        launch, launched = self._launcher(call, provider.graph and case.length <= _GRAPH_LENGTH)
        flops, input_bytes = provider.flops(case, mode), sum(x.nbytes for x in tensors)
        # a backward reads inputs, output and its gradient again and writes the inputs' gradients
        moved = input_bytes + output_bytes + backward * (2 * input_bytes + 2 * output_bytes)

        def figures(median: float) -> dict[str, Any]:
            tflops = 1e-12 * flops / median
            return {
                "flops": flops, "bytes": moved, "extra_peak_bytes": peak, "launched": launched, "tflops": tflops,
                "matmul_share": tflops / self.ceilings["matmul_tflops"], "gb_per_s": 1e-9 * moved / median,
            }  # fmt: skip

        return Prepared(partial(self.clock.seconds, launch), figures)

    def _launcher(self, call: Callable[[], object], graph: bool) -> tuple[Callable[[], object], str]:
        try:
            return self.clock.prepare(call, graph)
        except RuntimeError as error:
            if not graph:
                raise
            launch, launched = self.clock.prepare(call, False)
            why = "out of memory" if out_of_memory(error) else f"{type(error).__name__}: {str(error)[:300]}"
            return launch, f"{launched}, no graph: {why}"


def ceilings(clock: HostClock, case: OperatorCase) -> dict[str, Any]:
    """What this device does at best: a large matrix product and a large copy."""
    on_gpu = torch.device(case.device).type == "cuda"
    size, count = (8192, 1 << 29) if on_gpu else (256, 1 << 20)
    a, b = (torch.randn(size, size, **case.factory) for _ in range(2))
    source = torch.randn(count, **case.factory)
    target = torch.empty_like(source)

    def best(call: Callable[[], object]) -> float:
        prepared, _ = clock.prepare(call, False)
        return quartiles([clock.seconds(prepared) for _ in range(_CEILING_ROUNDS)])[1]

    return {
        "matmul_size": size,
        "matmul_tflops": 2e-12 * size**3 / best(lambda: a @ b),
        "copy_gb_per_s": 2e-9 * source.nbytes / best(lambda: target.copy_(source)),
    }


def _hyperglu_inputs(case: OperatorCase) -> list[Tensor]:
    """q, k, v, then diag, down, up and gate of both mixings; as many table rows as tokens."""
    batch, length, heads, rank = case.batch, case.length, case.num_heads, case.mix_rank
    normal = partial(torch.randn, **case.factory)
    streams = [normal(batch, length, _MAPS * heads, case.score_width) for _ in "qk"]
    streams.append(normal(batch, length, heads, case.hidden_size // heads))
    for count in (_MAPS * heads, heads):
        # sums over a row of any length stay near the scores
        tables = [normal(count, length), *(normal(count, length, rank) * length**-0.5 for _ in range(2))]
        streams += [0.1 * tables[0], *tables[1:], normal(batch, length, count, rank).sigmoid()]
    return streams


def _hyperglu(backend: str, tensors: list[Tensor]) -> Tensor:
    q, k, v, diag1, down1, up1, gate1, diag2, down2, up2, gate2 = tensors
    routing, readout = SequenceMix(diag1, down1, up1, gate1), SequenceMix(diag2, down2, up2, gate2)
    return hyper_attention(q, k, v, routing, readout, backend=cast(Any, backend))


def _hyperglu_flops(case: OperatorCase, mode: str) -> int:
    sizes: dict[str, Any] = {
        "num_heads": case.num_heads, "num_maps": _MAPS, "qk": case.score_width,
        "v": case.hidden_size // case.num_heads, "ranks": (case.mix_rank, case.mix_rank),
    }  # fmt: skip
    forward = forward_flops(case.pairs, **sizes)
    return forward if mode == "forward" else forward + backward_flops(case.pairs, **sizes)


def _softmax_inputs(case: OperatorCase) -> list[Tensor]:
    shape = (case.batch, case.length, case.hidden_size // case.head_width, case.head_width)
    return [torch.randn(shape, **case.factory) for _ in "qkv"]


def _softmax_flops(case: OperatorCase, mode: str) -> int:
    # two products forward; five backward, one of them the scores again
    return (4 if mode == "forward" else 14) * case.pairs * case.hidden_size


def _dense_softmax(tensors: list[Tensor]) -> Tensor:
    return dense_softmax(*tensors)


def _sdpa(backend: SDPBackend | None) -> Callable[[OperatorCase], Call]:
    def chosen() -> AbstractContextManager[object]:
        return nullcontext() if backend is None else sdpa_kernel(backend)

    def call(tensors: list[Tensor]) -> Tensor:
        with chosen():
            q, k, v = (x.transpose(1, 2) for x in tensors)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return lambda case: call


def _flex(case: OperatorCase) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i >= j

    mask = create_block_mask(causal, None, None, case.length, case.length, device=case.device)
    # one length at a time: beyond its limit of recompilations PyTorch would run uncompiled, and not say so
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def call(tensors: list[Tensor]) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in tensors)
        return compiled(q, k, v, block_mask=mask).transpose(1, 2)

    return call


def _ours(backend: str, description: str, **options: Any) -> OperatorProvider:
    call = partial(_hyperglu, backend)
    return OperatorProvider(
        backend, f"HyperGLU, {description}", inputs=_hyperglu_inputs, build=lambda case: call,
        exact=partial(_hyperglu, "reference"), flops=_hyperglu_flops, **options,
    )  # fmt: skip


def _softmax(
    name: str, description: str, build: Callable[[OperatorCase], Call], device: str | None = "cuda"
) -> OperatorProvider:
    return OperatorProvider(
        name, f"softmax, {description}", inputs=_softmax_inputs, build=build, exact=_dense_softmax,
        flops=_softmax_flops, device=device, baseline=True,
    )  # fmt: skip


OPERATOR_PROVIDERS = (
    _ours("triton", "fused kernels", device="cuda"),
    _ours("chunked", "chunked path", graph=False),
    _ours("reference", "dense reference", peak_bytes=reference_bytes, graph=False),
    _softmax("sdpa", "the kernel that SDPA picks", _sdpa(None), device=None),
    _softmax("sdpa-flash", "SDPA's FlashAttention-2", _sdpa(SDPBackend.FLASH_ATTENTION)),
    _softmax("sdpa-cudnn", "SDPA's cuDNN kernel", _sdpa(SDPBackend.CUDNN_ATTENTION)),
    _softmax("sdpa-efficient", "SDPA's memory-efficient kernel", _sdpa(SDPBackend.EFFICIENT_ATTENTION)),
    _softmax("flex", "FlexAttention compiled for the length", _flex),
)
