"""The record of a swap in the model's config: of one model alone, and of what stands when it is saved."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from hypermlp import restore_attention, swap_attention
from hypermlp.integrations import resize_positions
from hypermlp.integrations.huggingface import from_pretrained
from tests.integrations.huggingface import checks
from tests.integrations.huggingface.hosts import logits, stock, swapped, tokens
from tests.integrations.toy import ToyAdapter, ToyBlock, adapter

__all__ = ["adapter"]  # a fixture

IDS = tokens(2, 9)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    checks.quiet()


def check_reopens(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    out = logits(from_pretrained(folder).double().eval(), IDS)
    torch.testing.assert_close(out, logits(copy.deepcopy(model).double(), IDS), rtol=1e-12, atol=1e-12)


def configs(model: Any) -> list[Any]:
    """The config of every module that has one, originals that wait to be restored included."""
    kept = [module._replaced_attention.original for module in model.modules() if hasattr(module, "_replaced_attention")]
    return [module.config for module in [*model.modules(), *kept] if "config" in vars(module)]


def test_models_of_one_config(tmp_path: Path) -> None:
    first: Any = stock("llama")
    config = first.config
    before = config.to_dict()
    second: Any = LlamaForCausalLM(config).eval()
    third: Any = LlamaForCausalLM(config).eval()
    swap_attention(first)
    swap_attention(second, norm=False)
    for name, model in (("first", first), ("second", second)):
        check_reopens(model, tmp_path / name)
    assert third.config is config
    assert config.to_dict() == before
    # one that is built of a swapped model's config holds that too
    fourth: Any = LlamaForCausalLM(first.config).eval()
    swap_attention(fourth, "hypermlp", layers=[1])
    check_reopens(first, tmp_path / "again")
    check_reopens(fourth, tmp_path / "fourth")
    restore_attention(fourth)
    check_reopens(first, tmp_path / "once more")


def test_all_parts_of_a_model_hold_its_config() -> None:
    model: Any = stock("llama")
    old, held = model.config, len(configs(model))
    swap_attention(model)
    assert model.config is not old
    assert len(configs(model)) == held + 2  # originals and what stands in their place
    assert all(config is model.config for config in configs(model))
    model.config.use_cache = False  # what is said after the swap stays said
    restore_attention(model)
    assert len(configs(model)) == held
    assert all(config is model.config for config in configs(model))
    assert not hasattr(model.config, "hypermlp")
    assert not model.config.use_cache
    assert "save_pretrained" not in vars(model)


def test_a_record_that_stays_the_same_keeps_the_config() -> None:
    model: Any = swapped("gpt2")
    config = model.config
    with pytest.raises(ValueError, match="swapped already"):
        swap_attention(model)
    assert model.config is config


def test_a_model_within_another_module(tmp_path: Path) -> None:
    """A trainer's module holds the model: each model that it holds is saved with its own places."""
    held = nn.ModuleDict({"teacher": stock("llama"), "student": stock("gpt2", seed=1)})
    report = swap_attention(held, layers=[1, 2, 3], max_lag=16)
    assert [entry.name.split(".")[0] for entry in report.swapped] == ["teacher", "student", "student"]
    check_reopens(held["teacher"], tmp_path / "teacher")
    check_reopens(held["student"], tmp_path / "student")
    assert [swap["layers"] for swap in held["student"].config.hypermlp] == [[0, 1]]


def test_a_wrapper_around_a_model_follows(tmp_path: Path) -> None:
    class Wrapper(nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model, self.config = model, model.config

    wrapper = Wrapper(stock("llama"))
    swap_attention(wrapper)
    assert wrapper.config is wrapper.model.config
    check_reopens(wrapper.model, tmp_path)


def test_a_model_within_a_swapped_one_is_saved_with_its_own_record(tmp_path: Path) -> None:
    model: Any = stock("llama")
    swap_attention(model, layers=[1])
    assert model.model.config is model.config
    model.model.save_pretrained(tmp_path)
    again: Any = from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).last_hidden_state, model.model(IDS).last_hidden_state, rtol=0, atol=1e-9)
    assert model.model.config is model.config


def pruned(model: Any, keep: list[int]) -> Any:
    """As people do it: layers taken out, the others numbered anew."""
    model.model.layers = nn.ModuleList(model.model.layers[n] for n in keep)
    for n, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = n
    model.config.num_hidden_layers = len(keep)
    model.config.layer_types = model.config.layer_types[: len(keep)] if hasattr(model.config, "layer_types") else None
    return model


@pytest.mark.parametrize("keep", [[0, 2, 3], [1, 3], [0]])
def test_layers_taken_out(keep: list[int], tmp_path: Path) -> None:
    model: Any = stock("llama", num_hidden_layers=4)
    swap_attention(model, "hypermlp", layers=[1], mix_rank=4)
    swap_attention(model, "hyperglu", layers=[2, 3])
    check_reopens(model, tmp_path / "all")
    record = copy.deepcopy(model.config.hypermlp)
    pruned(model, keep)
    if keep == [0]:  # nothing of ours is left: a stock model
        model.save_pretrained(tmp_path / "part")
        again = LlamaForCausalLM.from_pretrained(tmp_path / "part").eval()
        torch.testing.assert_close(logits(again, IDS), logits(model, IDS), rtol=0, atol=1e-9)
        with pytest.raises(ValueError, match="no swapped model"):
            from_pretrained(tmp_path / "part")
    else:
        check_reopens(model, tmp_path / "part")
    assert model.config.hypermlp == record, "saving writes nothing into the model"


def test_copies_save_themselves(tmp_path: Path) -> None:
    """Deep copies and pickles look at themselves, not at the model that they were made of."""
    model: Any = swapped("gpt2", num_hidden_layers=3)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies: dict[str, Any] = {"copied": copy.deepcopy(model), "pickled": torch.load(file, weights_only=False)}
    for name, other in copies.items():
        del other.transformer.h[2]
        other.config.num_hidden_layers = 2
        check_reopens(other, tmp_path / name)
    check_reopens(model, tmp_path / "itself")


def test_tables_resized_are_recorded(tmp_path: Path) -> None:
    model: Any = swapped("bert")
    resize_positions(model, 40)
    assert model.config.hypermlp[0]["config"]["max_lag"] == 40
    ids = tokens(2, 40)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(from_pretrained(tmp_path).eval(), ids), logits(model, ids), rtol=0, atol=1e-9)


def test_an_adapter_that_fails_leaves_no_record(adapter: ToyAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleDict({"host": stock("gpt2"), "toy": ToyBlock()})
    before = model["host"].config.to_dict()

    def refuse(*args: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(ToyAdapter, "finish", refuse)
    with pytest.raises(RuntimeError, match="no"):
        swap_attention(model)
    assert model["host"].config.to_dict() == before
    assert "save_pretrained" not in vars(model["host"])
