"""Swapped models over two processes: sharded parameters."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.hf_names import set_checkpointing
from tests.integrations.huggingface import checks
from tests.integrations.huggingface.hosts import swapped, tokens

WORLD = 2


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def gradients(model: Any, rows: slice) -> dict[str, Tensor]:
    model.zero_grad()
    ids = tokens(WORLD, 9)[rows]
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def sharded(rank: int, port: int, name: str, checkpointing: bool, out: str) -> None:
    """Each process one row; the gradients, averaged and put together again, go to ``out``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    model: Any = swapped(name).train()
    if checkpointing:
        set_checkpointing(model, use_reentrant=False)
    blocks = model.transformer.h if name == "gpt2" else model.model.layers
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    whole = {key: grad.full_tensor() for key, grad in gradients(model, slice(rank, rank + 1)).items()}
    if rank == 0:
        torch.save(whole, out)
    model.eval()
    written = checks.generate(model, tokens(1, 5), new_tokens=4)
    assert torch.equal(written, checks.generate(swapped(name), tokens(1, 5), new_tokens=4))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "checkpointing"), [("llama", False), ("llama", True), ("gpt2", False)])
def test_sharded_gradients_are_those_of_one_process(name: str, checkpointing: bool, tmp_path: Path) -> None:
    out = tmp_path / "gradients.pt"
    torch.multiprocessing.spawn(sharded, (free_port(), name, checkpointing, str(out)), nprocs=WORLD)
    found = torch.load(out)
    model = swapped(name).train()
    each = [{key: grad.clone() for key, grad in gradients(model, slice(n, n + 1)).items()} for n in range(WORLD)]
    assert found.keys() == each[0].keys()
    for key, grad in found.items():
        expected = sum(part[key] for part in each) / WORLD
        assert checks.error(grad, expected) < 1e-6 * max(1.0, float(expected.abs().max())), key
    other = gradients(model, slice(0, 1))
    assert any(checks.error(grad, other[key]) > 1e-3 for key, grad in found.items()), "one row's gradient alone"


def head_parallel(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    model: Any = swapped("llama")
    plan = {
        "q_proj": ColwiseParallel(),
        "k_proj": ColwiseParallel(),
        "v_proj": ColwiseParallel(),
        "o_proj": RowwiseParallel(),
    }
    mixer = model.model.layers[0].self_attn.mixer
    parallelize_module(mixer, init_device_mesh("cpu", (WORLD,)), plan)
    with pytest.raises((ValueError, RuntimeError)):
        model(tokens(1, 5))
    dist.destroy_process_group()


@pytest.mark.slow
def test_projections_alone_cannot_be_split_by_head() -> None:
    """Tables and gates have heads too: splitting the four projections is an error, not a wrong result."""
    torch.multiprocessing.spawn(head_parallel, (free_port(),), nprocs=WORLD)
