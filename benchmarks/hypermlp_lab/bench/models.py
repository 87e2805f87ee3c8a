"""Training throughput of whole language models: HyperGLU against softmax attention at equal parameters.

One step is forward, backward and AdamW, with parameters in float32 and products in the dtype of the case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from hypermlp.budget import count_block_kept
from hypermlp.config import HyperConfig
from hypermlp.layers import AttentionLayer
from hypermlp.models import LanguageModel, LanguageModelConfig
from hypermlp.ops.attention import Backend
from hypermlp_lab.bench.gate import Errors
from hypermlp_lab.bench.measure import extra_peak_bytes
from hypermlp_lab.bench.run import Benchmark, Prepared, throughput
from hypermlp_lab.bench.settings import Case, Provider
from hypermlp_lab.training.memory import total_memory
from hypermlp_lab.training.recipe import byte_model, match_parameters, parameter_count

Size = Literal["demo", "gpt2"]
_MIXERS = ("hyperglu", "softmax")
_GATE_BATCH = 2
_FLOAT = 4
# of the loss, by which low precision moves it a little in a deep model
_LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}


@dataclass(frozen=True, kw_only=True)
class ModelCase(Case):
    """One model size and sequence length.

    Attributes:
        length: tokens of a sequence, and ``max_lag``.
        batch: sequences of a step.
        dtype: of products.
        size: ``"demo"``, the byte models of ``make demo``, or ``"gpt2"``, of about 124M parameters.
    """

    size: Size = "gpt2"

    @property
    def name(self) -> str:
        return f"{self.size}, {self.batch} x {self.length} tokens"

    def configs(self) -> dict[str, LanguageModelConfig]:
        """HyperGLU with 2 heads, and softmax with its MLP widened to the same number of parameters."""
        if self.size == "demo":
            shape = {"hidden_size": 128, "num_layers": 3, "seq_len": self.length}
            made = [byte_model(mixer, **shape) for mixer in _MIXERS]
        else:
            hidden, layers, vocab = 768, 12, 50257
            # a SwiGLU of 2048 has the parameters of GPT-2's MLP of 3072
            made = [
                LanguageModelConfig(vocab, hidden, layers, HyperConfig(hidden, 2, max_lag=self.length), 2048),
                LanguageModelConfig(vocab, hidden, layers, HyperConfig(hidden, 12, mixer="softmax", rope=True), 2048),
            ]
        return dict(zip(_MIXERS, match_parameters(*made), strict=True))


@dataclass(frozen=True, kw_only=True)
class ModelProvider(Provider):
    """A mixer with a path of its operator."""

    mixer: str
    backend: Backend


MODEL_PROVIDERS = (
    ModelProvider(
        "hyperglu-auto", "HyperGLU, as it comes: the native path where there is a compiler",
        mixer="hyperglu", backend="auto", device="cpu",
    ),
    ModelProvider("hyperglu-triton", "HyperGLU, fused kernels", mixer="hyperglu", backend="triton", device="cuda"),
    ModelProvider("hyperglu-chunked", "HyperGLU, chunked path", mixer="hyperglu", backend="chunked", device="cpu"),
    ModelProvider("softmax", "softmax (SDPA)", mixer="softmax", backend="auto", baseline=True),
)  # fmt: skip


def needed_bytes(case: ModelCase, providers: Sequence[ModelProvider]) -> int:
    """All models' weights, gradients and AdamW's moments, which are there together, and what the largest step keeps.

    That is what their forward leaves for the backward (:func:`hypermlp.budget.count_block_kept`), and of the logits
    the logarithm of their softmax and two gradients. The least: workspaces come on top.
    """
    configs = [case.configs()[provider.mixer] for provider in providers]
    itemsize, on_gpu = case.dtype.itemsize, torch.device(case.device).type == "cuda"
    steps = [
        3 * _FLOAT * case.batch * case.length * config.vocab_size
        + config.num_layers * count_block_kept(
            config.attention, config.intermediate_size, case.batch, case.length, itemsize=itemsize, fused_norm=on_gpu
        ).total
        for config in configs
    ]  # fmt: skip
    return sum(4 * _FLOAT * parameter_count(config) for config in configs) + max(steps)


def check_memory(cases: Sequence[ModelCase], providers: Sequence[ModelProvider]) -> None:
    """ValueError where the device has less than :func:`needed_bytes`, before anything is built."""
    largest = max(cases, key=lambda case: case.length)
    needed, there = needed_bytes(largest, providers), total_memory(torch.device(largest.device))
    if there is not None and needed > there:
        raise ValueError(
            f"{largest.name}: {len(providers)} models, {', '.join(provider.name for provider in providers)}, need more "
            f"than {needed / 2**30:,.1f} GiB together and {largest.device} has {there / 2**30:,.1f}: give a smaller "
            "--batch, shorter --lengths, fewer models by --only, or --size demo"
        )


class TrainingStep:
    """A model with its optimiser and one batch of random tokens."""

    def __init__(self, case: ModelCase, provider: ModelProvider) -> None:
        self.case = case
        torch.manual_seed(0)
        self.model = LanguageModel(case.configs()[provider.mixer], backend=provider.backend, device=case.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.tokens = torch.randint(self.model.config.vocab_size, (case.batch, case.length + 1), device=case.device)

    def loss(self) -> Tensor:
        device_type = torch.device(self.case.device).type
        with torch.autocast(device_type, self.case.dtype, enabled=self.case.dtype != torch.float32):
            return self.model.loss(self.tokens[:, :-1], self.tokens[:, 1:])

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


class ModelBenchmark(Benchmark[ModelProvider, ModelCase]):
    """Training steps; a provider is checked at every size that is measured."""

    name = "models"

    @property
    def timing(self) -> str:  # type: ignore[override]
        return self.clock.how

    def modes(self, case: ModelCase) -> Sequence[str]:
        return (case.name,)

    def gate_cases(self) -> dict[str, ModelCase]:
        sizes = {case.size: case for case in sorted(self.settings.cases, key=lambda case: case.length)}
        return {
            f"{size}, T = {small.length}": small
            for size, case in sizes.items()
            for small in replace(case, batch=_GATE_BATCH).at(*(min(n, case.length) for n in self.settings.gate_lengths))
        }

    def errors(self, provider: ModelProvider, case: ModelCase) -> Errors:
        """Of the loss and the gradient's norm of one batch, against the dense reference path in float32."""
        got = _loss_and_gradient(TrainingStep(case, provider))
        exact = TrainingStep(replace(case, dtype=torch.float32), provider)
        for module in exact.model.modules():
            if isinstance(module, AttentionLayer):
                module.backend = "reference"
        want = _loss_and_gradient(exact)
        allowed = _LOSS_TOLERANCE[case.dtype]
        loss, norm = (abs(a - b) / abs(b) for a, b in zip(got, want, strict=True))
        return {"loss": (loss, allowed), "norm of the gradient": (norm, 5 * allowed)}

    def prepare(self, provider: ModelProvider, case: ModelCase, mode: str) -> Prepared:
        step = TrainingStep(case, provider)
        step()  # the optimiser makes its state in the first one
        peak = extra_peak_bytes(step, self.device)
        return Prepared(partial(self.clock.seconds, step), throughput(step.model, case, peak))


def _loss_and_gradient(step: TrainingStep) -> tuple[float, float]:
    loss = step.loss()
    loss.backward()  # type: ignore[no-untyped-call]
    squares = [p.grad.double().square().sum() for p in step.model.parameters() if p.grad is not None]
    return float(loss.detach()), float(torch.stack(squares).sum().sqrt())
