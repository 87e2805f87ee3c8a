"""A language model in torchtitan's trainer on CPUs, and what it should come to by PyTorch alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.utils import clip_grad_norm_

from hypermlp import HyperConfig
from hypermlp.models import LanguageModel, LanguageModelConfig
from hypermlp_lab.bench.gate import compare, judge

VOCAB, TOKENS, BATCH, STEPS = 40, 32, 4, 4
MAX_NORM = 0.5
OPTIMIZER = {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1}  # an eps that keeps rounding from being divided by itself
ATTENTION = HyperConfig(16, num_heads=2, qk_dim=16, max_lag=TOKENS, mix_rank=3)
MODELS = {
    "tied": LanguageModelConfig(VOCAB, 16, 2, ATTENTION),
    "own head": LanguageModelConfig(VOCAB, 16, 2, ATTENTION, tie_embeddings=False),
}
Curve = dict[str, Tensor]


def model_of(flavor: str) -> LanguageModel:
    """Away from its start, where some tables are zero."""
    torch.manual_seed(0)
    model = LanguageModel(MODELS[flavor])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def ids_of(step: int) -> Tensor:
    return torch.randint(VOCAB, (BATCH, TOKENS + 1), generator=torch.Generator().manual_seed(step))


def by_pytorch(flavor: str, dtype: torch.dtype) -> Curve:
    """Loss and gradient norm of each step, and the parameters after the last."""
    model = model_of(flavor).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), **OPTIMIZER)
    found = []
    for step in range(STEPS):
        ids = ids_of(step)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        found.append((loss.detach(), clip_grad_norm_(model.parameters(), MAX_NORM)))
        optimizer.step()
    losses, norms = (torch.stack(values) for values in zip(*found, strict=True))
    return {"losses": losses, "norms": norms, **{name: p.detach() for name, p in model.named_parameters()}}


class Rows:
    """This process's rows of every batch, as torchtitan's loaders give them."""

    def __init__(self, dp_world_size: int, dp_rank: int, tokenizer: None, job_config: Any) -> None:
        self.world, self.rank, self.rows, self.given = dp_world_size, dp_rank, job_config.training.local_batch_size, 0

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        parts = BATCH // self.world // self.rows
        while True:
            step, part = divmod(self.given, parts)
            own = ids_of(step).chunk(self.world)[self.rank].chunk(parts)[part]
            self.given += 1
            yield {"input": own[:, :-1]}, own[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.given = state["given"]


def on_cpu() -> None:
    """Import torchtitan, which looks for an accelerator then, and let it find the CPU."""
    cpu = SimpleNamespace(
        current_device=lambda: 0, get_device_name=lambda _: "CPU", memory_stats=lambda _: {},
        get_device_properties=lambda _: SimpleNamespace(total_memory=2**34),
        **dict.fromkeys(("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats"), lambda *_: None),
    )  # fmt: skip
    with (
        mock.patch("torch._utils._get_available_device_type", return_value="cpu"),
        mock.patch("torch._utils._get_device_module", return_value=cpu),
    ):
        import torchtitan.train  # noqa: F401


def job_of(folder: str, changes: dict[str, Any]) -> Any:
    """A job from the weights under ``folder``, with ``changes`` by dotted name."""
    from torchtitan.config import JobConfig

    job = JobConfig()
    fields = {
        "job.dump_folder": f"{folder}/out",
        "model.name": "hypermlp", "model.flavor": "tied",
        "training.seq_len": TOKENS, "training.steps": STEPS, "training.max_norm": MAX_NORM,
        "training.mixed_precision_param": "float32",
        "optimizer.implementation": "for-loop", **{f"optimizer.{name}": x for name, x in OPTIMIZER.items()},
        "lr_scheduler.warmup_steps": 0, "lr_scheduler.decay_ratio": 0.0,
        "activation_checkpoint.mode": "none", "metrics.log_freq": 1,
        "checkpoint.enable": True, "checkpoint.load_only": True, "checkpoint.initial_load_path": f"{folder}/start",
    }  # fmt: skip
    for name, value in (fields | changes).items():
        section, _, key = name.partition(".")
        assert hasattr(getattr(job, section), key), name
        setattr(getattr(job, section), key, value)
    return job


def trained(folder: str, changes: dict[str, Any]) -> Curve:
    on_cpu()
    from torchtitan.protocols import train_spec
    from torchtitan.train import Trainer

    from hypermlp.integrations.torchtitan import register

    if "hypermlp" not in train_spec._extra_train_specs:
        register(MODELS, build_dataloader_fn=Rows, build_tokenizer_fn=None)
    os.environ |= {"RANK": str(dist.get_rank()), "LOCAL_RANK": "0", "WORLD_SIZE": str(dist.get_world_size())}
    job = job_of(folder, changes)
    shared = job.parallelism.context_parallel_degree
    if "training.local_batch_size" not in changes:
        job.training.local_batch_size = BATCH * shared // dist.get_world_size()
    found: list[tuple[float, float]] = []
    trainer = Trainer(job)
    trainer.metrics_processor.log = lambda step, loss, largest, norm, **_: found.append((float(loss), norm))
    trainer.train()
    trainer.close()
    weights = get_model_state_dict(trainer.model_parts[0], options=StateDictOptions(full_state_dict=True))
    losses, norms = torch.tensor(found, dtype=torch.float64).T
    return {"losses": losses, "norms": norms, **weights}


def check_as_one(
    folder: str,
    wanted: dict[torch.dtype, Curve],
    changes: dict[str, Any],
    first: int = 0,
    dtype: torch.dtype = torch.float32,
) -> None:
    """By the rule of the benchmarks' gate: against float64, by what PyTorch alone loses in ``dtype``."""
    found = trained(folder, changes)
    assert found.keys() == wanted[torch.float64].keys()
    assert len(found["losses"]) == STEPS - first

    def evaluate(exact_in: torch.dtype | None) -> Curve:
        if exact_in is None:
            return found
        return {name: x[first:] if name in ("losses", "norms") else x for name, x in wanted[exact_in].items()}

    verdict = judge("", lambda: compare(evaluate, dtype))
    assert verdict.passed, verdict.reason


def check_validation(folder: str) -> None:
    """Of weights that stay: the means of two batches each, after the first step and the last; a third is looked at."""
    on_cpu()
    from torchtitan.components import metrics, validate

    def loader(dp_world_size: int, dp_rank: int, job_config: Any, **_: Any) -> Rows:
        return Rows(dp_world_size, dp_rank, None, job_config)

    found: list[float] = []
    with (
        mock.patch.object(validate, "build_text_validation_dataloader", loader),
        mock.patch.object(metrics.MetricsProcessor, "log_validation", lambda _, loss, step: found.append(loss)),
    ):
        trained(folder, {"validation.enable": True, "validation.steps": 2, "validation.freq": STEPS, "optimizer.lr": 0})
    model = model_of("tied").double()
    each = [
        torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).item()
        for ids in map(ids_of, range(5))
    ]
    expected = torch.tensor([(each[0] + each[1]) / 2, (each[3] + each[4]) / 2])
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-5, atol=0)
