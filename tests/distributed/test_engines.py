"""PyTorch's own engines around a language model: 2 and 4 processes train as one does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from hypermlp import HyperConfig
from hypermlp.config import Mixer
from hypermlp.distributed import along_lags
from hypermlp.models import LanguageModel, LanguageModelConfig
from tests.distributed.processes import run_checks
from tests.helpers import assert_close

BATCH, TOKENS, STEPS = 8, 13, 4
RTOL = 1e-9


def model_of(tied: bool = True, mixer: Mixer = "hyperglu", heads: int = 2) -> LanguageModel:
    torch.manual_seed(0)
    attention = HyperConfig(16, mixer=mixer, num_heads=heads, qk_dim=16, max_lag=8, mix_rank=3)
    return LanguageModel(LanguageModelConfig(40, 16, 2, attention, tie_embeddings=tied), dtype=torch.float64)


def fully_sharded(model: LanguageModel, mesh: Any, **options: Any) -> LanguageModel:
    """Each block, and what is left in the root's group: embedding, last norm, head."""
    for block in model.layers:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def trained(
    model: Any, optimizer: torch.optim.Optimizer, steps: Iterable[int], rank: int = 0, world: int = 1, micro: int = 1
) -> Tensor:
    """Loss and gradient norm of each step; ``micro`` batches are summed up."""
    found = []
    for step in steps:
        ids = torch.randint(40, (BATCH, TOKENS + 1), generator=torch.Generator().manual_seed(step)).chunk(world)[rank]
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for index, part in enumerate(ids.chunk(micro)):
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(index == micro - 1)
            loss = nn.functional.cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten()) / micro
            loss.backward()
            total += loss.detach()
        if world > 1:
            dist.all_reduce(total)
        norm = whole(clip_grad_norm_(model.parameters(), 0.5))
        optimizer.step()
        found.append(torch.stack((total / world, norm)))
    return torch.stack(found)


def as_one(model: nn.Module, run: Any, like: LanguageModel, micro: int = 1) -> None:
    """``run``, the engine around ``model``, trains as ``like`` does in one process."""
    expected = trained(like, optimizer_of(like), range(STEPS))
    found = trained(run, optimizer_of(model), range(STEPS), dist.get_rank(), dist.get_world_size(), micro)
    assert_close({"losses, norms": found}, {"losses, norms": expected}, RTOL)
    parameters = [{n: whole(p.detach()) for n, p in m.named_parameters()} for m in (model, like)]
    renamed = {name.replace("_checkpoint_wrapped_module.", ""): x for name, x in parameters[0].items()}
    assert_close(renamed, parameters[1], 1e-6)  # AdamW divides by the root of what may be next to nothing


def check_ddp() -> None:
    model = model_of()
    as_one(model, DistributedDataParallel(model), model_of())


def check_fsdp(tied: bool, micro: int, mixer: Mixer = "hyperglu") -> None:
    model = fully_sharded(model_of(tied, mixer), init_device_mesh("cpu", (dist.get_world_size(),)))
    as_one(model, model, model_of(tied, mixer), micro)


def check_hsdp() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("replicas", "shards"))
    model = fully_sharded(model_of(), mesh)
    as_one(model, model, model_of())


def check_recomputed_and_compiled() -> None:
    model = model_of()
    for index, block in enumerate(model.layers):
        model.layers[index] = checkpoint_wrapper(block)
    for block in model.layers:
        block.compile(backend="aot_eager")
    fully_sharded(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    as_one(model, model, model_of())


def check_shards_along_lags(replicated: bool = False) -> None:
    """Tables [heads, lags, ...] over more processes than heads: by their lags, which divide."""
    world = dist.get_world_size()
    if replicated:
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("replicas", "shards"))
    else:
        mesh = init_device_mesh("cpu", (world,))
    shards = mesh.size(-1)
    model, whole = (model_of(heads=shards // 2) for _ in range(2))
    fully_sharded(model, mesh, shard_placement_fn=along_lags(mesh))
    as_one(model, model, whole)
    mixing = model.layers[0].attention.readout_mix
    assert tuple(mixing.down.to_local().shape) == (shards // 2, 8 // shards, 3)
    assert tuple(mixing.diag.to_local().shape) == (shards // 2, 8 // shards)
    assert tuple(model.layers[0].attention.k_proj.weight.to_local().shape) == (16 // shards, 16)


def check_placement_errors() -> None:
    with pytest.raises(TypeError, match="mesh must be a DeviceMesh or None, got ProcessGroup"):
        along_lags(dist.group.WORLD)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one dimension, or two for HSDP, got 3"):
        along_lags(init_device_mesh("cpu", (dist.get_world_size(), 1, 1)))
    placement = along_lags()
    odd = dist.get_world_size() + 1
    assert placement(nn.Parameter(torch.empty(odd))) is None
    assert placement(nn.Parameter(torch.empty(odd, odd))) is None


def check_started_without_memory() -> None:
    """Built on the meta device, sharded, then started: each process its own part, of one start."""
    with torch.device("meta"):
        model = model_of()
    fully_sharded(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.reset_parameters()
    taps = whole(model.layers[0].attention.k_conv.weight.detach())
    assert abs(float(taps[:, -1].mean()) - 1) < 0.05
    assert 0.01 < float(taps[:, :-1].std()) < 0.03


def check_saved(folder: str) -> None:
    """Four steps, the first two of them before a checkpoint that is written beside the training."""
    model = fully_sharded(model_of(), init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = optimizer_of(model)
    trained(model, optimizer, range(2), dist.get_rank(), dist.get_world_size())
    state, of_optimizer = get_state_dict(model, optimizer)
    dcp.async_save({"model": state, "optimizer": of_optimizer}, checkpoint_id=folder).result()


def check_resumed(folder: str) -> None:
    like, world = model_of(), dist.get_world_size()
    expected = trained(like, optimizer_of(like), range(STEPS))[2:]
    model = fully_sharded(model_of(), init_device_mesh("cpu", (world,)))
    optimizer = optimizer_of(model)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    state, of_optimizer = get_state_dict(model, optimizer)
    dcp.load({"model": state, "optimizer": of_optimizer}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state, optim_state_dict=of_optimizer)
    found = trained(model, optimizer, range(2, STEPS), dist.get_rank(), world)
    assert_close({"losses, norms": found}, {"losses, norms": expected}, RTOL)


CHECKS: dict[str, Callable[[], None]] = {
    "DDP": check_ddp,
    "FSDP2": partial(check_fsdp, True, 1),
    "FSDP2, head of its own, two micro batches": partial(check_fsdp, False, 2),
    "FSDP2, hypermlp": partial(check_fsdp, True, 1, "hypermlp"),
    "HSDP": check_hsdp,
    "recomputed and compiled": check_recomputed_and_compiled,
    "shards along lags": check_shards_along_lags,
    "shards along lags, replicated": partial(check_shards_along_lags, True),
    "errors of a placement": check_placement_errors,
    "started without memory": check_started_without_memory,
}


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_engines(world: int, tmp_path: Path) -> None:
    found = run_checks(CHECKS, tmp_path, world)
    assert not any(found.values()), "\n".join(line for lines in found.values() for line in lines)


@pytest.mark.slow
def test_a_checkpoint_of_four_processes_goes_on_with_two(tmp_path: Path) -> None:
    for world, check in ((4, check_saved), (2, check_resumed)):
        (tmp_path / str(world)).mkdir()
        found = run_checks({"": partial(check, str(tmp_path / "dcp"))}, tmp_path / str(world), world)
        assert not found[""], "\n".join(found[""])
