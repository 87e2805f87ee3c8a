"""How operators are checked and measured, against what the device does at best in the same run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hypermlp_lab.bench.clock import Clock
from hypermlp_lab.bench.gate import Errors, Trials, compare
from hypermlp_lab.bench.measure import extra_peak_bytes, out_of_memory, quartiles
from hypermlp_lab.bench.operators import OperatorCase, OperatorProvider
from hypermlp_lab.bench.run import Benchmark, Prepared

# the longest that is launched from a CUDA graph, where the operator allows it
_GRAPH_LENGTH = 8192
_CEILING_ROUNDS = 30


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

    def trials(self, provider: OperatorProvider) -> Trials:
        cases = self.settings.cases[0].at(*self.settings.gate_lengths)
        gradients = self.settings.modes != ("forward",)
        return {f"T = {case.length}": partial(errors, provider, case, gradients) for case in cases}

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


def errors(provider: OperatorProvider, case: OperatorCase, gradients: bool) -> Errors:
    """Of the output and, where a backward is measured, of the gradient of every input."""
    inputs = provider.inputs(case)

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


def ceilings(clock: Clock, case: OperatorCase) -> dict[str, Any]:
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
