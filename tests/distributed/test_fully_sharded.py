"""Heads over one dimension of a mesh, FSDP2 over the other: four processes equal one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hypermlp import HyperConfig
from hypermlp.distributed import clip_grad_norm_, full_state_dict, sequence_part, shard_heads, shard_sequence
from hypermlp.models import LanguageModel, LanguageModelConfig
from tests.distributed.processes import run_checks
from tests.helpers import assert_close

DATA, HEADS = 2, 2
BATCH, TOKENS = 4, 17
RTOL = 1e-10


def model_of(seed: int = 3) -> LanguageModel:
    torch.manual_seed(seed)
    attention = HyperConfig(hidden_size=16, num_heads=4, qk_dim=16, mix_rank=2, max_lag=7, bias=True)
    model = LanguageModel(LanguageModelConfig(40, 16, 2, attention), dtype=torch.float64)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


def mesh_of() -> Any:
    return dist.device_mesh.init_device_mesh("cpu", (DATA, HEADS), mesh_dim_names=("data", "heads"))


def sharded(mesh: Any, seed: int = 3) -> LanguageModel:
    model = model_of(seed)
    shard_heads(model, mesh["heads"])
    for block in model.blocks:
        fully_shard(block, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    return model


def trained(model: LanguageModel, ids: Tensor, clip: Callable[[LanguageModel], Tensor]) -> Tensor:
    """Two steps with clipped gradients; their norms."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    norms = []
    for _ in range(2):
        optimizer.zero_grad()
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        norms.append(clip(model))
        optimizer.step()
    return torch.stack(norms)


@contextmanager
def shared_folder() -> Iterator[str]:
    """A folder of the first process, for all."""
    with TemporaryDirectory() as own:
        names = [own]
        dist.broadcast_object_list(names)
        yield names[0]
        dist.barrier()


def token_ids() -> Tensor:
    return torch.randint(40, (BATCH, TOKENS), generator=torch.Generator().manual_seed(4))


def check_training() -> None:
    """Norms, clipped steps and the state put together again."""
    mesh = mesh_of()
    model, whole, ids = sharded(mesh), model_of(), token_ids()
    found = trained(model, ids.chunk(DATA)[mesh["data"].get_local_rank()], lambda m: clip_grad_norm_(m, 0.5))
    expected = trained(whole, ids, lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.5))
    state = full_state_dict(model)
    assert expected.min() > 0.5, "gradients are clipped"
    assert not any(isinstance(x, DTensor) for x in state.values())
    assert_close({"norms": found}, {"norms": expected}, RTOL)
    assert_close(state, whole.state_dict(), RTOL)


def check_distributed_checkpoint_is_refused(wrap: bool) -> None:
    """Saving, with and without a copy to memory, and loading; the way that the message says."""
    mesh = mesh_of()
    model = model_of()
    if wrap:
        model = sharded(mesh)
    else:
        shard_heads(model, mesh["heads"])
    whole = full_state_dict(model)
    again = {key: torch.zeros_like(x) for key, x in whole.items()}
    with shared_folder() as folder:
        for state in (get_model_state_dict(model), model.state_dict()):
            with pytest.raises(CheckpointException, match="full_state_dict"):
                dcp.save({"model": state}, checkpoint_id=folder)
        with pytest.raises(CheckpointException, match="full_state_dict"):
            dcp.async_save({"model": model.state_dict()}, checkpoint_id=folder).result()
        dcp.save({"model": whole}, checkpoint_id=folder)
        dcp.load({"model": again}, checkpoint_id=folder)
        with pytest.raises(CheckpointException, match="Size mismatch"):
            dcp.load({"model": model.state_dict()}, checkpoint_id=folder)
    assert all(torch.equal(again[key], x) for key, x in model_of().state_dict().items())


def check_file_of_one_process() -> None:
    """What is not a distributed checkpoint keeps working: a plain file, with plain tensors in it."""
    model = model_of()
    shard_heads(model, mesh_of()["heads"])
    with TemporaryDirectory() as folder:
        torch.save(model.state_dict(), Path(folder) / "part.pt")
        state = torch.load(Path(folder) / "part.pt", weights_only=True)
    assert not any(vars(x) for x in state.values())
    model.load_state_dict(state)


def check_sequence() -> None:
    """FSDP2 over all, batches over one dimension of the mesh and the sequence over the other; means of means."""
    mesh = mesh_of()
    model, whole, ids = model_of(), model_of(), token_ids()
    shard_sequence(model, mesh["heads"])
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    losses = []
    for m in (model, whole):
        x, targets = ids[:, :-1], ids[:, 1:]
        if m is model:
            x, targets = (y.chunk(DATA)[mesh["data"].get_local_rank()] for y in (x, targets))
            x, targets = (sequence_part(y, mesh["heads"]) for y in (x, targets))
        loss = nn.functional.cross_entropy(m(x).flatten(0, 1), targets.flatten())
        loss.backward()
        losses.append(loss.detach())
    dist.all_reduce(losses[0])
    assert_close({"loss": losses[0] / (DATA * HEADS)}, {"loss": losses[1]}, RTOL)
    grads = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    assert_close(grads, {name: p.grad for name, p in whole.named_parameters()}, RTOL)
    norms = clip_grad_norm_(model, 0.5), nn.utils.clip_grad_norm_(whole.parameters(), 0.5)
    assert_close({"norm": norms[0]}, {"norm": norms[1]}, RTOL)


CHECKS: dict[str, Callable[[], None]] = {
    "training": check_training,
    "distributed checkpoint, heads alone": partial(check_distributed_checkpoint_is_refused, False),
    "distributed checkpoint, and FSDP": partial(check_distributed_checkpoint_is_refused, True),
    "sequence": check_sequence,
    "file": check_file_of_one_process,
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return run_checks(CHECKS, tmp_path_factory.mktemp("mesh"), DATA * HEADS)


@pytest.mark.parametrize("name", CHECKS)
def test_four_processes_equal_one(name: str, found: dict[str, list[str]]) -> None:
    assert not found[name], "\n".join(found[name])
