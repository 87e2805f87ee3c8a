"""The plan's formulas against small models that are trained: memory, FLOPs and bytes, as PyTorch has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hypermlp import HyperConfig
from hypermlp.budget import count_flops, count_norm_kept
from hypermlp.distributed import sequence_part, shard_heads, shard_sequence
from hypermlp.models import LanguageModel, LanguageModelConfig
from hypermlp_lab.bench.measure import extra_peak_bytes
from hypermlp_lab.plan.costs import Mesh, Step
from hypermlp_lab.training.recipe import parameter_count
from tests.distributed.processes import run_checks
from tests.kept import kept_bytes

BATCH, TOKENS = 4, 32
SIZES = {"narrow": (64, 32, 3), "many tokens": (1024, 16, 2)}
each_size = pytest.mark.parametrize("size", SIZES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def config_of(size: str = "narrow", tied: bool = True) -> LanguageModelConfig:
    vocab, hidden, layers = SIZES[size]
    attention = HyperConfig(hidden, 2, max_lag=TOKENS, mix_rank=3)
    return LanguageModelConfig(vocab, hidden, layers, attention, tie_embeddings=tied)


def recomputed(model: LanguageModel) -> LanguageModel:
    for index, block in enumerate(model.layers):
        model.layers[index] = checkpoint_wrapper(block)
    return model


def ids_of(config: LanguageModelConfig, batch: int = BATCH, tokens: int = TOKENS) -> Tensor:
    return torch.randint(config.vocab_size, (batch, tokens))


class Loss(nn.Module):
    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model.loss(ids, ids)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_and_optimizer_are_those_of_a_model(tied: bool) -> None:
    config = config_of(tied=tied)
    model = LanguageModel(config)
    optimizer = torch.optim.AdamW(model.parameters())
    model.loss(ids := ids_of(config), ids).backward()
    optimizer.step()
    moments = [x for state in optimizer.state.values() for name, x in state.items() if name != "step"]
    memory = Step(config, TOKENS, BATCH, itemsize=4).memory()
    assert memory["weights"] == 4 * model.num_parameters() == memory["gradients"]
    assert memory["optimizer"] == sum(x.numel() * x.itemsize for x in moments)


@each_size
@each_dtype
def test_a_forward_keeps_the_activations(size: str, dtype: torch.dtype) -> None:
    """All but the logits, of which one of the three is kept, the targets, and the norms (of every PyTorch its own)."""
    config = config_of(size)
    step = Step(config, TOKENS, BATCH, itemsize=dtype.itemsize, fused_norm=False)
    ids = ids_of(config)
    found = kept_bytes(Loss(LanguageModel(config, dtype=dtype)), ids)
    norm = kept_bytes(nn.RMSNorm(config.hidden_size, dtype=dtype), torch.zeros(
        BATCH, TOKENS, config.hidden_size, dtype=dtype, requires_grad=True
    ))  # fmt: skip
    norms = 2 * config.num_layers + 1
    counted = count_norm_kept(config.hidden_size, BATCH * TOKENS, itemsize=dtype.itemsize, fused=False)
    memory = step.memory()
    # ids are inputs and targets here, and the loss keeps its weight
    expected = memory["operator"] + memory["activations"] + memory["logits"] // 3 + 4 - norms * (counted - norm)
    assert found == expected


@each_size
@each_dtype
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_takes_what_is_planned_and_less_than_the_headroom_more(
    size: str, dtype: torch.dtype, checkpointing: bool
) -> None:
    config = config_of(size)
    model, ids = LanguageModel(config, dtype=dtype), ids_of(config, tokens=4 * TOKENS)
    if checkpointing:
        recomputed(model)
    model.loss(ids, ids).backward()  # gradients are there from now on

    peak = extra_peak_bytes(lambda: model.loss(ids.clone(), ids).backward(), torch.device("cpu"))
    step = Step(config, 4 * TOKENS, BATCH, itemsize=dtype.itemsize, fused_norm=False, checkpointing=checkpointing)
    memory = step.memory()
    planned = step.peak() - sum(memory[name] for name in ("weights", "gradients", "optimizer"))
    gradients = dtype.itemsize * parameter_count(config)
    assert planned <= peak <= planned / 0.9 + gradients


@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_are_those_pytorch_counts(checkpointing: bool) -> None:
    """Convolutions apart, which it leaves out."""
    config = config_of()
    model = LanguageModel(config, backend="chunked")
    if checkpointing:
        recomputed(model)
    with FlopCounterMode(display=False) as counter:
        model.loss(ids := ids_of(config), ids).backward()
    flops = Step(config, TOKENS, BATCH, checkpointing=checkpointing).flops()
    convolutions = config.num_layers * count_flops(config.attention, BATCH, TOKENS).convolutions
    assert counter.get_total_flops() == sum(flops.values()) - (4 if checkpointing else 3) * convolutions


class Sent(TorchDispatchMode):
    """Bytes that a process sends by collective calls that rings carry, by kind."""

    def __init__(self) -> None:
        self.bytes = {"gather": 0, "scatter": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, others = str(func), dist.get_world_size() - 1
        if "allgather_base" in name:
            self.bytes["gather"] += args[1].numel() * args[1].itemsize * others
        elif "reduce_scatter_base" in name:
            self.bytes["scatter"] += args[0].numel() * args[0].itemsize * others
        return func(*args, **(kwargs or {}))


def check_fully_sharded() -> None:
    """Shards that divide: FSDP2 pads others."""
    world = dist.get_world_size()
    config = config_of()
    model: Any = LanguageModel(config)
    mesh = init_device_mesh("cpu", (world,))
    for block in model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = ids_of(config).chunk(world)[dist.get_rank()]
    with Sent() as sent:
        for part in ids.chunk(2):
            model.loss(part, part).backward()
    optimizer.step()
    step = Step(config, TOKENS, BATCH, Mesh(data=world), itemsize=4, passes=2)
    memory, expected = step.memory(), step.sent()
    locals_ = [p.to_local() for p in model.parameters() if isinstance(p, DTensor)]
    own = sum(x.numel() * x.itemsize for x in locals_)
    moments = [x.to_local() for s in optimizer.state.values() for name, x in s.items() if name != "step"]
    assert memory["optimizer"] == sum(x.numel() * x.itemsize for x in moments) == 2 * own
    assert sent.bytes == {"gather": expected["weights"], "scatter": expected["gradients"]}
    assert expected["heads"] == expected["sequence"] == 0


def check_parts_of_a_model() -> None:
    """Heads on two processes, or the sequence: parameters and what a forward keeps of each."""
    config = config_of()
    ids = ids_of(config)
    heads, sequence = LanguageModel(config), LanguageModel(config)
    shard_heads(heads)
    shard_sequence(sequence)
    step = Step(config, TOKENS, BATCH, Mesh(heads=2), itemsize=4, fused_norm=False)
    assert parameter_count(step.part) == heads.num_parameters()
    assert 4 * heads.num_parameters() == step.memory()["weights"]
    for model, mesh, own in ((heads, Mesh(heads=2), ids), (sequence, Mesh(sequence=2), sequence_part(ids))):
        step = Step(config, TOKENS, BATCH, mesh, itemsize=4, fused_norm=False)
        memory = step.memory()
        expected = memory["operator"] + memory["activations"] + memory["logits"] // 3 + 4
        assert kept_bytes(Loss(model), own) == expected, mesh


CHECKS: dict[str, Callable[[], None]] = {
    "fully sharded": check_fully_sharded,
    "parts of a model": check_parts_of_a_model,
}


def test_two_processes_send_and_keep_what_is_planned(tmp_path: Path) -> None:
    found = run_checks(CHECKS, tmp_path)
    assert not any(found.values()), "\n".join(line for lines in found.values() for line in lines)
