"""Models of transformers whose attention heads are spread over two processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

pytest.importorskip("transformers", minversion="5.5", reason="models of transformers need the extra hf")

import peft
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from hypermlp.distributed import full_state_dict, sequence_part, sequence_whole, shard_heads, shard_sequence
from hypermlp.integrations.huggingface import from_pretrained
from tests.distributed.processes import WORLD, run_checks
from tests.helpers import assert_close
from tests.hf_names import set_checkpointing
from tests.integrations.huggingface import checks
from tests.integrations.huggingface.hosts import swapped, tokens
from tests.models.families import VOCAB, tiny

RTOL = 1e-10


def model_of(name: str) -> Any:
    return (tiny(name) if name in ("hyperglu", "softmax") else swapped(name).double()).eval()


def sharded(name: str) -> Any:
    model = model_of(name)
    shard_heads(model)
    return model


def padded() -> dict[str, Tensor]:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    ids = tokens(2, 9) % VOCAB
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def gradients(model: Any) -> dict[str, Tensor]:
    """Of a padded batch, those of sharded parameters put together again."""
    loss = model(**padded(), use_cache=False).loss
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return full_state_dict(model) | {"loss": loss.detach()}


def check_gradients(name: str) -> None:
    model = sharded(name).train()
    if name == "llama":
        set_checkpointing(model, use_reentrant=False)
    assert_close(gradients(model), gradients(model_of(name).train()), RTOL)


def check_generate(name: str) -> None:
    """Left-padded greedy text, beams and a static cache, as one process writes them."""
    batch = {key: padded()[key] for key in ("input_ids", "attention_mask")}
    model, whole = sharded(name), model_of(name)
    for options in ({}, {"num_beams": 3}, {"cache_implementation": "static"}, {"do_sample": True}):
        options = {"do_sample": False, "disable_compile": True} | options
        found, expected = (
            checks.generate(m, batch["input_ids"], attention_mask=batch["attention_mask"], **options)
            for m in (model, whole)
        )
        assert torch.equal(found, expected), options


def check_saved_and_opened() -> None:
    """What one process saves opens as a whole model."""
    model = sharded("llama")
    state = full_state_dict(model)
    found = []
    if dist.get_rank() == 0:
        with TemporaryDirectory() as folder:
            model.save_pretrained(folder, state_dict=state)
            again = from_pretrained(folder, dtype=torch.float64).eval()
        found = [(again.state_dict()[key], x) for key, x in model_of("llama").state_dict().items()]
    dist.barrier()
    assert all(torch.equal(actual, expected) for actual, expected in found)


def check_sequence(name: str) -> None:
    """A model of the family on each process's rows of padded sequences."""
    model, whole = model_of(name), model_of(name)
    shard_sequence(model)
    ids, mask = tokens(2, 16) % VOCAB, torch.ones(2, 16, dtype=torch.long)
    mask[0, :3] = 0
    logits = model(sequence_part(ids), attention_mask=sequence_part(mask), use_cache=False).logits
    expected = whole(ids, attention_mask=mask, use_cache=False).logits
    assert_close({"logits": sequence_whole(logits)}, {"logits": expected}, RTOL)
    with pytest.raises(ValueError, match="leave position_ids out"):
        model(sequence_part(ids), position_ids=sequence_part(torch.arange(16)[None]), use_cache=False)
    for arguments in ({"use_cache": True}, {"use_cache": False, "output_attentions": True}):
        with pytest.raises(ValueError, match="shard_sequence"):
            model(sequence_part(ids), **arguments)
    with pytest.raises(ValueError, match="stands in a swapped model"):
        shard_sequence(model_of("gpt2"))


def check_fully_sharded() -> None:
    """FSDP2 over the other dimension of the mesh (of one process here)."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("data", "heads"))
    model = model_of("llama").train()
    shard_heads(model, mesh["heads"])
    for block in model.model.layers:
        fully_shard(block, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    whole = model_of("llama").train()
    losses = [m(**padded(), use_cache=False).loss for m in (model, whole)]
    for loss in losses:
        loss.backward()
    assert_close({"loss": losses[0]}, {"loss": losses[1]}, RTOL)
    name = "model.layers.0.self_attn.mixer.k_conv.weight"
    found, expected = (dict(m.named_parameters())[name].grad for m in (model, whole))
    assert_close({name: found.full_tensor()}, {name: expected}, RTOL)
    with pytest.raises(ValueError, match="sharded already"):
        shard_heads(model)


def check_split_mlps() -> None:
    """Beside MLPs that PyTorch splits."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
    model, whole = sharded("llama").train(), model_of("llama").train()
    plan = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
    for block in model.model.layers:
        parallelize_module(block.mlp, mesh, plan)
    losses = [m(**padded(), use_cache=False).loss for m in (model, whole)]
    for loss in losses:
        loss.backward()
    assert_close({"loss": losses[0]}, {"loss": losses[1]}, RTOL)
    names = ["model.embed_tokens.weight", "model.layers.0.self_attn.mixer.v_conv.weight"]
    found, expected = ({name: m.get_parameter(name).grad for name in names} for m in (model, whole))
    assert_close(found, expected, RTOL)


def check_adapters() -> None:
    """LoRA would miss the sum: it is refused in either order."""
    config = peft.LoraConfig(target_modules=["q_proj", "o_proj"])
    with pytest.raises(ValueError, match="not supported"):
        peft.get_peft_model(sharded("llama"), config)
    with pytest.raises(ValueError, match="lora_A"):
        shard_heads(peft.get_peft_model(model_of("llama"), config))


CHECKS: dict[str, Callable[[], None]] = {
    **{f"gradients of {name}": partial(check_gradients, name) for name in ("llama", "gpt2", "hyperglu", "softmax")},
    **{f"generate of {name}": partial(check_generate, name) for name in ("llama", "gpt2", "hyperglu", "softmax")},
    "saved and opened": check_saved_and_opened,
    **{f"sequence of {name}": partial(check_sequence, name) for name in ("hyperglu", "softmax")},
    "fully sharded": check_fully_sharded,
    "split MLPs": check_split_mlps,
    "adapters": check_adapters,
}


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    found = run_checks(CHECKS, tmp_path)
    assert not any(found.values()), "\n".join(line for lines in found.values() for line in lines)
