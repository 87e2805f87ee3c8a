"""Saving, opening again, pickling, restoring swapped transformers models."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hypermlp import restore_attention, swap_attention
from hypermlp.integrations.huggingface import from_pretrained, rebuild
from tests.integrations.huggingface import checks
from tests.integrations.huggingface.hosts import BUILD, logits, stock, swapped, tokens


@pytest.fixture(autouse=True)
def _quiet() -> None:
    checks.quiet()


def check_round_trip(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    again, info = from_pretrained(folder, output_loading_info=True)
    assert type(again) is type(model)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = tokens(2, 9)
    checks.check_same_weights(again, model)
    assert checks.error(logits(again.eval(), ids), logits(model, ids)) < checks.TOLERANCE
    buffers = dict(again.named_buffers())
    assert all(torch.equal(buffers[name], buffer) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("name", BUILD)
def test_round_trip(name: str, tmp_path: Path) -> None:
    check_round_trip(swapped(name), tmp_path)


def test_round_trip_of_different_layers(tmp_path: Path) -> None:
    model = stock("llama", num_hidden_layers=4)
    swap_attention(model, "hypermlp", layers=[0, 2], mix_rank=4)
    swap_attention(model, "hyperglu", layers=[-1], conv_size=0)
    check_round_trip(model, tmp_path)
    again = from_pretrained(tmp_path)
    kinds = [type(layer.self_attn).__name__ for layer in again.model.layers]
    assert kinds == ["HyperLlamaAttention", "LlamaAttention", "HyperLlamaAttention", "HyperLlamaAttention"]
    with pytest.raises(ValueError, match=r"no originals of .*layers\.0\.self_attn'.*: a saved model holds none"):
        restore_attention(again)


def test_a_weight_that_is_not_saved_is_noticed(tmp_path: Path) -> None:
    model: Any = swapped("llama")
    weights = model.state_dict()
    lost = next(name for name in weights if name.endswith("routing_mix.down"))
    model.save_pretrained(tmp_path, state_dict={name: tensor for name, tensor in weights.items() if name != lost})
    with pytest.raises(ValueError, match=r"routing_mix\.down"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "gpt_neox", "bert"])
def test_opening_as_stock_is_flagged(name: str, tmp_path: Path) -> None:
    """Every weight of the attention it lacks is called missing, none is filled from ours."""
    model: Any = swapped(name)
    model.save_pretrained(tmp_path)
    _, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    attention = set(stock(name).state_dict()) - set(model.state_dict())
    assert attention
    assert attention <= set(info["missing_keys"])
    assert any(".mixer." in key for key in info["unexpected_keys"])


def test_from_pretrained_of_a_stock_model_is_an_error(tmp_path: Path) -> None:
    model: Any = stock("llama")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no swapped model.*LlamaForCausalLM\.from_pretrained"):
        from_pretrained(tmp_path)


def test_dtype_and_class_can_be_given(tmp_path: Path) -> None:
    model: Any = swapped("llama")
    model.save_pretrained(tmp_path)
    inner = type(model.model)
    again = from_pretrained(tmp_path, model_class=inner, dtype=torch.bfloat16)
    assert type(again) is inner
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}


def test_fields_of_the_config_can_be_given(tmp_path: Path) -> None:
    """As the stock class takes them; the saved ones stay."""
    model: Any = swapped("llama")
    model.save_pretrained(tmp_path)
    fields = {"use_cache": False, "attn_implementation": "eager", "output_attentions": True}
    again = from_pretrained(tmp_path, **fields)
    assert (again.config.use_cache, again.config._attn_implementation) == (False, "eager")
    assert len(again(tokens(1, 5)).attentions) == 2
    assert all(module.config is again.config for module in again.modules() if "config" in vars(module))
    with pytest.raises(TypeError, match="bogus"):
        from_pretrained(tmp_path, bogus=3)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    before = config.to_dict()
    from_pretrained(tmp_path, config=config)
    assert config.to_dict() == before


def test_sharded_files_and_a_device_map(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="needs accelerate")
    model: Any = swapped("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ids = tokens(2, 9)
    again = from_pretrained(tmp_path, device_map="cpu").eval()
    checks.check_same_weights(again, model)
    assert checks.error(logits(again, ids), logits(model, ids)) < checks.TOLERANCE


def test_trainer_and_its_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="needs accelerate")
    model: Any = swapped("llama")
    before = logits(model, tokens(2, 9))
    data = [{"input_ids": ids, "labels": ids} for ids in tokens(4, 9)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, save_steps=2, per_device_train_batch_size=2, learning_rate=1e-2,
        report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    transformers.Trainer(model, arguments, train_dataset=data).train()
    model.eval()
    after = logits(model, tokens(2, 9))
    assert checks.error(after, before) > 1e-2
    again = from_pretrained(tmp_path / "checkpoint-2").eval()
    checks.check_same_weights(again, model)
    assert checks.error(logits(again, tokens(2, 9)), after) < checks.TOLERANCE


def test_state_dict_into_a_model_swapped_alike() -> None:
    model: Any = swapped("gpt2")
    other: Any = stock("gpt2", seed=1)
    rebuild(other, json.loads(json.dumps(model.config.hypermlp)))
    other.load_state_dict(model.state_dict())
    ids = tokens(2, 9)
    assert checks.error(logits(other, ids), logits(model, ids)) < checks.TOLERANCE


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model: Any = swapped("gpt2")
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert again.lm_head.weight is again.transformer.wte.weight


def test_pickle_and_copy() -> None:
    model = swapped("llama")
    ids = tokens(2, 9)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (torch.load(file, weights_only=False), copy.deepcopy(model)):
        checks.check_same_weights(other, model)
        assert checks.error(logits(other, ids), logits(model, ids)) < checks.TOLERANCE
        restore_attention(other)
    checks.check_same_weights(model, swapped("llama"))


@pytest.mark.parametrize("name", BUILD)
def test_restore_undoes_everything(name: str) -> None:
    model: Any = stock(name)
    ids = tokens(2, 9)
    modules, weights = dict(model.named_modules()), {k: v.clone() for k, v in model.state_dict().items()}
    config, before = model.config.to_dict(), logits(model, ids)
    swap_attention(model)
    assert checks.error(logits(model, ids), before) > 1e-2
    restored = restore_attention(model)
    assert len(restored) == 2
    after = dict(model.named_modules())
    assert list(after) == list(modules)
    assert all(after[key] is modules[key] for key in modules)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())
    assert model.config.to_dict() == config
    assert checks.error(logits(model, ids), before) < checks.TOLERANCE


def test_restore_keeps_what_is_of_another_dtype() -> None:
    """ALBERT's attention has a norm of its own, which is kept in float32 where the rest is not."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model: Any = transformers.AlbertModel(transformers.AlbertConfig(vocab_size=61, embedding_size=16, **sizes))
    model.bfloat16()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
            nn.init.uniform_(module.weight, 0.5, 1.5)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    swap_attention(model)
    restore_attention(model)
    found = dict(model.named_parameters())
    assert {name: p.dtype for name, p in found.items()} == {name: p.dtype for name, p in weights.items()}
    assert all(torch.equal(found[name], p) for name, p in weights.items())


def test_restore_follows_the_model() -> None:
    model: Any = stock("llama").float().train()
    swap_attention(model)
    model.to(torch.float64).eval()
    restore_attention(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert not any(module.training for module in model.modules())
    assert logits(model, tokens(2, 5)).dtype == torch.float64


def test_offloaded_models_are_neither_swapped_nor_restored() -> None:
    """accelerate keeps the weights elsewhere: the originals' own would be lost."""
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    model: Any = stock("llama")
    ids = tokens(2, 9)
    before = logits(model, ids)
    accelerate.cpu_offload(model)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn .*offloaded.*remove_hook_from_submodules"):
        swap_attention(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    swap_attention(model)
    out = logits(model, ids)
    accelerate.cpu_offload(model)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn .*offloaded.*remove_hook_from_submodules"):
        restore_attention(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(logits(model, ids), out)
    restore_attention(model)
    assert torch.equal(logits(model, ids), before)


def test_sharded_models_are_neither_swapped_nor_restored(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model: Any = stock("llama")
        swap_attention(model, layers=[0])
        for layer in model.model.layers:
            fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        modules = list(model.modules())
        with pytest.raises(ValueError, match=r"layers\.1\.self_attn .* sharded \(DTensor\)"):
            swap_attention(model)
        with pytest.raises(ValueError, match=r"layers\.0\.self_attn .* sharded \(DTensor\)"):
            restore_attention(model)
        assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    finally:
        dist.destroy_process_group()


def test_restore_in_part_is_an_error() -> None:
    model = stock("llama")
    swap_attention(model, layers=[0])
    swap_attention(model, layers=[1], keep_originals=False)
    state = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"layers\.1.*keep_originals=False"):
        restore_attention(model)
    assert [type(module) for module in model.modules()] == state
    assert sum(isinstance(module, nn.Module) for module in model.modules()) == len(state)
