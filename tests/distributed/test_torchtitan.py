"""torchtitan's trainer around a language model: 1, 2 and 4 processes train as PyTorch alone does in one.

torchtitan itself is installed by ``make test-titan``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hypermlp import HyperConfig
from hypermlp.budget import count_flops
from hypermlp.models import LanguageModel, LanguageModelConfig
from hypermlp_lab.bench.gate import compare, judge, relative_error
from tests.distributed.processes import run_checks

try:  # not imported here: that asks for a device
    FOUND = version("torchtitan")
except PackageNotFoundError:
    FOUND = "none"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FOUND != "0.2.2", reason=f"the recipe is for torchtitan 0.2.2, found {FOUND}: make test-titan"),
]

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


def check_as_one(folder: str, wanted: dict[torch.dtype, Curve], changes: dict[str, Any], first: int = 0) -> None:
    """By the rule of the benchmarks' gate: against float64, by what float32 loses."""
    found = trained(folder, changes)
    wanted = {
        dtype: {name: x[first:] if name in ("losses", "norms") else x for name, x in curve.items()}
        for dtype, curve in wanted.items()
    }
    assert found.keys() == wanted[torch.float64].keys()
    assert len(found["losses"]) == STEPS - first
    verdict = judge("", lambda: compare(lambda dtype: found if dtype is None else wanted[dtype], torch.float32))
    assert verdict.passed, verdict.reason


@pytest.fixture(scope="module")
def wanted() -> dict[str, dict[torch.dtype, Curve]]:
    return {flavor: {dtype: by_pytorch(flavor, dtype) for dtype in (torch.float64, torch.float32)} for flavor in MODELS}


def run(checks: dict[str, Callable[[], None]], folder: Path, world: int) -> None:
    (folder / str(world)).mkdir()
    found = run_checks(checks, folder / str(world), world)
    assert not any(found.values()), "\n".join(line for lines in found.values() for line in lines)


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A folder with the weights to start from, as DCP and in the Hugging Face form."""
    from hypermlp.models.huggingface import HyperMLPForCausalLM

    dcp.save(model_of("tied").state_dict(), checkpoint_id=tmp_path / "start", no_dist=True)
    for flavor in MODELS:
        HyperMLPForCausalLM.from_language_model(model_of(flavor)).save_pretrained(tmp_path / flavor)
    return tmp_path


def test_one_and_two_processes(wanted: Any, start: Path) -> None:
    as_one = partial(check_as_one, str(start), wanted["tied"])
    run({"": partial(as_one, {})}, start, 1)
    compiled = {"compile.enable": True, "compile.components": ["model"], "compile.backend": "aot_eager"}
    selective = {"activation_checkpoint.mode": "selective", "activation_checkpoint.selective_ac_option": "op"}
    context = {"parallelism.context_parallel_degree": 2}
    run({
        "FSDP2": partial(as_one, {"parallelism.fsdp_reshard_after_forward": "never"}),
        "micro batches": partial(as_one, {"training.local_batch_size": 1, "training.global_batch_size": BATCH}),
        "full checkpointing": partial(as_one, {"activation_checkpoint.mode": "full"}),
        "selective checkpointing": partial(as_one, selective),
        "compiled": partial(as_one, compiled | selective),
        "context parallel": partial(as_one, context | selective),
        "context parallel, compiled": partial(as_one, context | compiled),
    }, start, 2)  # fmt: skip


def test_four_processes(wanted: Any, start: Path) -> None:
    as_one = partial(check_as_one, str(start), wanted["tied"])
    replicas, context = {"parallelism.data_parallel_replicate_degree": 2}, {"parallelism.context_parallel_degree": 2}
    run({
        "FSDP2": partial(as_one, {}),
        "HSDP": partial(as_one, replicas),
        "FSDP2, context parallel": partial(as_one, context),
        "HSDP, context parallel": partial(as_one, replicas | context),
    }, start, 4)  # fmt: skip


def test_one_process_goes_on_with_what_two_saved(wanted: Any, start: Path) -> None:
    """Written beside the training, after the second step."""
    as_one = partial(check_as_one, str(start), wanted["tied"])
    saved = {"checkpoint.load_only": False, "checkpoint.interval": 2, "checkpoint.async_mode": "async"}
    run({"": partial(as_one, saved)}, start, 2)
    assert sorted(path.name for path in (start / "out" / "checkpoint").iterdir()) == ["step-2", "step-4"]
    run({"": partial(as_one, {"checkpoint.load_step": 2}, first=2)}, start, 1)


def test_hugging_face_weights(wanted: Any, start: Path) -> None:
    """Two processes start from them and export them; the family opens the folder once it has a ``config.json``."""
    from transformers import AutoModelForCausalLM

    from hypermlp.models.huggingface import HyperMLPConfig, HyperMLPForCausalLM

    run({
        flavor: partial(check_as_one, str(start), wanted[flavor], {
            "model.flavor": flavor, "job.dump_folder": f"{start}/out {flavor}",
            "checkpoint.initial_load_in_hf": True, "checkpoint.initial_load_path": f"{start}/{flavor}",
            "checkpoint.load_only": False, "checkpoint.last_save_in_hf": True,
        }) for flavor in MODELS
    }, start, 2)  # fmt: skip
    for flavor, config in MODELS.items():
        folder = start / f"out {flavor}" / "checkpoint" / f"step-{STEPS}"
        HyperMLPConfig.from_language_model(config).save_pretrained(folder)
        found = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        plain = LanguageModel(config).double()
        plain.load_state_dict({n: x for n, x in wanted[flavor][torch.float64].items() if n not in ("losses", "norms")})
        expected = HyperMLPForCausalLM.from_language_model(plain).state_dict()
        assert found.keys() == expected.keys()
        for name, x in expected.items():
            assert relative_error(found[name], x) < 1e-4, name


def parallel_dims(**degrees: int) -> Any:
    from torchtitan.distributed import ParallelDims

    every = dict.fromkeys(("dp_replicate", "dp_shard", "cp", "tp", "pp", "ep", "etp"), 1) | degrees
    return ParallelDims(**every, world_size=math.prod(every.values()))


class Calls(TorchDispatchMode):
    """How often the operator's forward is computed."""

    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found += func in (torch.ops.hypermlp.native_forward.default, torch.ops.hypermlp.chunked_forward.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("mode", "times"), [("none", 1), ("selective", 1), ("full", 2)])
def test_selective_checkpointing_keeps_the_operator(mode: str, times: int) -> None:
    on_cpu()
    from hypermlp.integrations.torchtitan import ModelArgs, TitanLanguageModel, parallelize

    model = TitanLanguageModel(ModelArgs(model=MODELS["tied"].to_dict()))
    changes = {"activation_checkpoint.mode": mode, "activation_checkpoint.selective_ac_option": "op"}
    parallelize(model, parallel_dims(), job_of("", changes))
    with Calls() as calls:
        model(ids_of(0)).sum().backward()
    assert calls.found == times * MODELS["tied"].num_layers


def test_parameters_and_flops_are_those_counted() -> None:
    """Convolutions apart, which PyTorch's counter leaves out."""
    on_cpu()
    from hypermlp.integrations.torchtitan import ModelArgs, TitanLanguageModel

    convolutions = 3 * 2 * count_flops(ATTENTION, 1, TOKENS).convolutions
    for config in MODELS.values():
        args = ModelArgs(model=config.to_dict())
        model = TitanLanguageModel(args)
        with FlopCounterMode(display=False) as counter:
            model(ids_of(0)[:1, :TOKENS]).sum().backward()
        found = args.get_nparams_and_flops(model, TOKENS)
        assert found == (model.num_parameters(), (counter.get_total_flops() + convolutions) // TOKENS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallelism.tensor_parallel_degree": 2}, "tensor_parallel_degree must be 1 for these models, got 2"),
        ({"parallelism.pipeline_parallel_degree": 2}, "pipeline_parallel_degree must be 1"),
        ({"parallelism.expert_parallel_degree": 2}, "expert_parallel_degree must be 1"),
        ({"parallelism.context_parallel_load_balancer": None}, "load_balancer must be 'headtail' .*, got None"),
        ({"parallelism.context_parallel_rotate_method": "alltoall"}, "rotate_method must be 'allgather'"),
        ({"validation.enable": True}, "validation.enable must be False"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    on_cpu()
    from hypermlp.integrations.torchtitan import ModelArgs

    with pytest.raises(ValueError, match=message):
        ModelArgs().update_from_config(job_of("", {"parallelism.context_parallel_degree": 2} | changes))


def test_replicas_alone_are_refused() -> None:
    on_cpu()
    from hypermlp.integrations.torchtitan import ModelArgs, TitanLanguageModel, parallelize

    model = TitanLanguageModel(ModelArgs(model=MODELS["tied"].to_dict()))
    with pytest.raises(ValueError, match="data_parallel_replicate_degree=2 leaves no process to shard over"):
        parallelize(model, parallel_dims(dp_replicate=2), job_of("", {}))
    with pytest.raises(ValueError, match="positions came without context parallelism"):
        model(ids_of(0), torch.arange(TOKENS + 1))
