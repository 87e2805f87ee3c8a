"""Hugging Face's Trainer with FSDP2 around the native family: 2 and 4 processes train as one does."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("transformers", minversion="5.5", reason="the Hugging Face family needs the extra hf")
pytest.importorskip("accelerate", reason="Trainer needs accelerate")

import torch
import torch.distributed as dist
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.processes import run_checks
from tests.models.families import tiny, tokens

from transformers import AutoModelForCausalLM, Trainer, TrainingArguments  # isort: skip

ROOT = Path(__file__).resolve().parents[2]
BATCH, STEPS, MICRO = 4, 4, 2
RTOL = 1e-9
LOSS_RTOL = BATCH * MICRO * torch.finfo(torch.float32).eps  # transformers' losses are sums in float32
pytestmark = pytest.mark.slow


@contextmanager
def fully_sharded_on_cpus() -> Iterator[None]:
    """accelerate takes FSDP for accelerators alone, and DDP here: let it take what is asked for."""
    start = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    with mock.patch.object(AcceleratorState, "__init__", init):
        yield


def model_of() -> Any:
    return tiny(max_position_embeddings=64).train()


def trainer_of(out: str, *, fsdp: str | None = None, saved: str = "no", **options: Any) -> Trainer:
    """Rows of several lengths, so that a mean of means would be another loss; each process has some of each batch."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    rows = [{"input_ids": (row := tokens(1, 4 + n % 5, n)[0].tolist()) + [0] * (8 - len(row)),
             "attention_mask": [1] * len(row) + [0] * (8 - len(row)),
             "labels": row + [-100] * (8 - len(row))} for n in range(BATCH * MICRO * STEPS)]  # fmt: skip
    if fsdp is not None:
        config = {"transformer_layer_cls_to_wrap": ["HyperMLPDecoderLayer"], "state_dict_type": fsdp, "version": 2}
        options |= {"fsdp": True, "fsdp_config": config}
    arguments = TrainingArguments(
        output_dir=out, max_steps=STEPS, per_device_train_batch_size=BATCH // world,
        gradient_accumulation_steps=MICRO, learning_rate=1e-2, max_grad_norm=0.5, logging_steps=1, save_strategy=saved,
        save_steps=2, use_cpu=True, report_to=[], disable_tqdm=True, **options,
    )  # fmt: skip
    return Trainer(model=model_of(), args=arguments, train_dataset=rows)


@contextmanager
def launched() -> Iterator[None]:
    """What ``torchrun`` tells a process."""
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    with mock.patch.dict(os.environ, names | {"ACCELERATE_USE_CPU": "true"}):
        yield


def curve(trainer: Trainer) -> torch.Tensor:
    """Loss and gradient norm of each step."""
    found = [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log]
    return torch.tensor(found, dtype=torch.float64)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    for values, others, rtol in zip(found.T, expected.T, (LOSS_RTOL, RTOL), strict=True):
        torch.testing.assert_close(values, others, rtol=rtol, atol=0)


def check_as_one(folder: str, expected: torch.Tensor, weights: dict[str, torch.Tensor]) -> None:
    with launched(), fully_sharded_on_cpus():
        trainer = trainer_of(folder, fsdp="FULL_STATE_DICT")
        trainer.train()
        assert isinstance(trainer.model, FSDPModule)
        assert isinstance(trainer.model.model.layers[0], FSDPModule)
        assert all(isinstance(p, DTensor) for p in trainer.model.parameters())
        assert_same(curve(trainer), expected)
        whole = {name: p.full_tensor().detach() for name, p in trainer.model.named_parameters()}
        for name, p in whole.items():
            torch.testing.assert_close(p, weights[name], rtol=1e-6, atol=1e-9, msg=name)
        trainer.save_model(f"{folder}/saved")
        if dist.get_rank() == 0:
            again = AutoModelForCausalLM.from_pretrained(f"{folder}/saved", dtype=torch.float64)
            assert all(torch.equal(p, whole[name]) for name, p in again.named_parameters())
        dist.barrier()


def check_saved(folder: str, kind: str) -> None:
    with launched(), fully_sharded_on_cpus():
        trainer_of(folder, fsdp=kind, saved="steps").train()


def check_resumed(folder: str, kind: str, expected: torch.Tensor) -> None:
    with launched(), fully_sharded_on_cpus():
        trainer = trainer_of(folder, fsdp=kind)
        trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
        assert_same(curve(trainer)[-2:], expected[-2:])


def check_traps(folder: str) -> None:
    """What the page warns of."""
    with launched():
        trainer = trainer_of(folder, fsdp="FULL_STATE_DICT")
        trainer.train()
        assert isinstance(trainer.model_wrapped, DistributedDataParallel), "FSDP on a CPU is DDP, without a word"
    with launched(), fully_sharded_on_cpus():
        trainer = trainer_of(folder, fsdp="SHARDED_STATE_DICT")
        trainer.train()
        trainer.save_model(f"{folder}/nothing")
        assert not Path(f"{folder}/nothing").exists()


def check_launched(folder: str, environment: dict[str, str], exact: torch.Tensor) -> None:
    """By twice what one process loses, launched in the same way, against float64."""
    with launched(), fully_sharded_on_cpus(), mock.patch.dict(os.environ, environment):
        trainer = trainer_of(folder)
        trainer.train()
        assert all(isinstance(part, FSDPModule) for part in (trainer.model, *trainer.model.model.layers))
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
        found = curve(trainer)
        if dist.get_world_size() == 1:
            torch.save(found, f"{folder}.pt")
        for wrong, lost in zip(*((x - exact).norm(dim=0) for x in (found, torch.load(f"{folder}.pt"))), strict=True):
            assert 0 < wrong <= 2 * lost, "in bfloat16, and no further off than one process"
        trainer.save_model(f"{folder}/saved")
        if dist.get_rank() == 0:
            AutoModelForCausalLM.from_pretrained(f"{folder}/saved")
        dist.barrier()


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    trainer = trainer_of(str(tmp_path_factory.mktemp("one")))
    trainer.train()
    found = curve(trainer)
    assert found.shape == (STEPS, 2)
    assert found[:, 1].min() > 0.5, "gradients are clipped"
    return found, {name: p.detach() for name, p in trainer.model.named_parameters()}


def run(checks: dict[str, Any], folder: Path, world: int) -> None:
    folder.mkdir()
    found = run_checks(checks, folder, world)
    assert not any(found.values()), "\n".join(line for lines in found.values() for line in lines)


@pytest.mark.parametrize(("world", "later"), [(2, 1), (4, 2)])
def test_processes_train_as_one_and_fewer_go_on_with_what_they_saved(
    one_process: Any, tmp_path: Path, world: int, later: int
) -> None:
    kinds = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")
    folders = {kind: str(tmp_path / kind) for kind in kinds}
    run({
        "as one": partial(check_as_one, str(tmp_path / "out"), *one_process),
        "traps": partial(check_traps, str(tmp_path / "traps")),
        **{kind: partial(check_saved, folders[kind], kind) for kind in kinds},
    }, tmp_path / "first", world)  # fmt: skip
    run({kind: partial(check_resumed, folders[kind], kind, one_process[0]) for kind in kinds}, tmp_path / "on", later)


def test_the_pages_launch_trains_as_one_process_does(one_process: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """What accelerate makes of the page's file for each process; its launcher takes one process on a CPU."""
    page = (ROOT / "docs" / "scale.md").read_text()
    (tmp_path / "fsdp.yaml").write_text(page.partition("```yaml\n")[2].partition("```")[0])
    (command,) = re.findall(r"`accelerate launch (--config_file fsdp.yaml .*?)`", page)
    monkeypatch.chdir(tmp_path)
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(command.split()))
    given = prepare_multi_gpu_env(arguments)
    environment = {name: x for name, x in given.items() if name.startswith(("ACCELERATE_", "FSDP_"))}
    assert environment["FSDP_TRANSFORMER_CLS_TO_WRAP"] == "HyperMLPDecoderLayer"
    for world in (1, 2):
        check = partial(check_launched, str(tmp_path / "out"), environment, one_process[0])
        run({"": check}, tmp_path / str(world), world)
