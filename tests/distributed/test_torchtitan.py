"""torchtitan's trainer around a language model: 1, 2 and 4 processes train as PyTorch alone does in one.

torchtitan itself is installed by ``make test-titan``.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hypermlp.budget import count_flops
from hypermlp.models import LanguageModel
from hypermlp_lab.bench.gate import relative_error
from tests.distributed.processes import run_checks
from tests.distributed.titan import (
    ATTENTION,
    BATCH,
    MODELS,
    STEPS,
    TOKENS,
    Curve,
    by_pytorch,
    check_as_one,
    check_validation,
    ids_of,
    job_of,
    model_of,
    on_cpu,
)

try:  # not imported here: that asks for a device
    FOUND = version("torchtitan")
except PackageNotFoundError:
    FOUND = "none"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FOUND != "0.2.2", reason=f"the recipe is for torchtitan 0.2.2, found {FOUND}: make test-titan"),
]

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wanted() -> dict[str, dict[torch.dtype, Curve]]:
    return {
        flavor: {dtype: by_pytorch(flavor, dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)}
        for flavor in MODELS
    }


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
    compiled = {"compile.enable": True, "compile.backend": "aot_eager"}
    inductor = {"compile.enable": True}
    selective = {"activation_checkpoint.mode": "selective", "activation_checkpoint.selective_ac_option": "op"}
    context = {"parallelism.context_parallel_degree": 2}
    run({
        "FSDP2": partial(as_one, {"parallelism.fsdp_reshard_after_forward": "never"}),
        "bfloat16": partial(as_one, {"training.mixed_precision_param": "bfloat16"}, dtype=torch.bfloat16),
        "micro batches, every second layer checkpointed": partial(as_one, {
            "training.local_batch_size": 1, "training.global_batch_size": BATCH,
            "activation_checkpoint.mode": "selective",
        }),
        "full checkpointing": partial(as_one, {"activation_checkpoint.mode": "full"}),
        "selective checkpointing": partial(as_one, selective),
        "compiled": partial(as_one, compiled | selective),
        "compiled by inductor": partial(as_one, inductor | selective),
        "compiled by inductor, a budget of memory": partial(as_one, inductor | {
            "activation_checkpoint.mode": "memory_budget",
        }),
        "validation": partial(check_validation, str(start)),
        "context parallel": partial(as_one, context),
        "context parallel, selective checkpointing": partial(as_one, context | selective),
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


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its module registers what its command asks for, and torchtitan and the recipe take every option it names."""
    on_cpu()
    from torchtitan.config import ConfigManager
    from torchtitan.protocols import train_spec

    section = (ROOT / "docs" / "scale.md").read_text().partition("## torchtitan\n")[2].partition("\n## ")[0]
    (tmp_path / "my_models.py").write_text(section.partition("```python\n")[2].partition("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(train_spec, "_extra_train_specs", {})
    command = section.partition("-m torchtitan.train ")[2].partition("\n\n")[0].replace("\\\n", " ").split()
    options = re.findall(r"^\| `(--.*?)` \|", section, re.MULTILINE)
    assert len(options) > 4
    for option in ["", *options]:
        job = ConfigManager().parse_args([*command, *option.split()])
        importlib.import_module(job.experimental.custom_import)
        spec = train_spec.get_train_spec(job.model.name)
        spec.model_args[job.model.flavor].update_from_config(job)
