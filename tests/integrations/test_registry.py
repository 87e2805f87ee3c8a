"""Which adapter reads a module: by class, by name, by a function; for good, or for one swap."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hypermlp import HyperGLU
from hypermlp.integrations import Adapter, register, registry, restore_attention, swap_attention, unregister
from hypermlp.integrations.hosts import CLASSES
from hypermlp.integrations.sites import swaps_in
from tests.integrations.toy import ToyAdapter, ToyAttention, ToyBlock, adapter, build

__all__ = ["adapter"]  # a fixture: the registry is as it was afterwards

PATH = "tests.integrations.toy.ToyAttention"


def big(module: nn.Module) -> bool:
    return getattr(module, "width", 0) == 16


@pytest.mark.parametrize("which", [ToyAttention, "ToyAttention", PATH, big], ids=["class", "name", "path", "function"])
def test_every_way_to_register_and_to_forget(adapter: ToyAdapter, which: Any) -> None:
    unregister("ToyAttention")
    with pytest.raises(ValueError, match="no attention of Sequential is known"):
        swap_attention(build())
    register(adapter, which)
    assert len(swap_attention(build()).swapped) == 3
    unregister(which)
    with pytest.raises(ValueError, match="no attention of Sequential is known"):
        swap_attention(build())
    with pytest.raises(ValueError, match="is not registered"):
        unregister(which)


def test_a_subclass_is_of_its_class_and_a_namesake_is_not(adapter: ToyAdapter) -> None:
    unregister("ToyAttention")
    register(adapter, ToyAttention)
    model = build(1)
    model[0].attention.__class__ = type("Derived", (ToyAttention,), {})
    assert len(swap_attention(model).swapped) == 1
    namesake = type("ToyAttention", (nn.Module,), {})
    assert registry.find(namesake()) is None
    unregister(ToyAttention)
    register(adapter, PATH)
    assert registry.find(namesake()) is None
    assert registry.find(ToyAttention()) is adapter


def test_the_last_one_that_fits_counts(adapter: ToyAdapter) -> None:
    later = ToyAdapter()
    register(later, big)
    assert registry.find(ToyAttention()) is later
    register(adapter, "ToyAttention")
    assert registry.find(ToyAttention()) is adapter
    unregister("ToyAttention")
    assert registry.find(ToyAttention()) is later


def test_a_registered_one_counts_before_our_own(adapter: ToyAdapter) -> None:
    ours = registry.find(nn.MultiheadAttention(4, 1))
    register(adapter, nn.MultiheadAttention)
    assert registry.find(nn.MultiheadAttention(4, 1)) is adapter
    unregister(nn.MultiheadAttention)
    assert registry.find(nn.MultiheadAttention(4, 1)) is ours


def test_a_forward_of_its_own_makes_another_class() -> None:
    plain = type("Plain", (nn.MultiheadAttention,), {})
    other = type("Other", (nn.MultiheadAttention,), {"forward": lambda self, x: x})
    assert registry.find(plain(4, 1)) is not None
    assert registry.find(other(4, 1)) is None


@pytest.mark.parametrize("given", ["one", "mapping"])
def test_an_adapter_for_one_swap(adapter: ToyAdapter, given: str) -> None:
    """It counts for this model alone, and for as long as something stands there."""
    unregister("ToyAttention")
    model, x = build(), torch.randn(2, 5, 16)
    out = model(x)
    toy = ToyAdapter()
    swap_attention(model, layers=[1], adapter=toy if given == "one" else {ToyAttention: toy})
    assert swaps_in(model)[0]["layers"] == [1]
    report = swap_attention(model, "hypermlp", layers=[2])
    assert [entry.reason for entry in report.left] == ["not among layers", "swapped before"]
    assert [swap["layers"] for swap in swaps_in(copy.deepcopy(model))] == [[1], [2]]
    assert isinstance(model[1].attention, HyperGLU)
    restore_attention(model)
    assert torch.equal(model(x), out)
    with pytest.raises(ValueError, match="no attention of Sequential is known"):
        swap_attention(model)


def test_bad_arguments_are_named(adapter: ToyAdapter) -> None:
    for bad in (3, nn.Linear(1, 1).weight, dict):
        with pytest.raises(TypeError, match="classes of modules, names of classes, or functions"):
            register(adapter, bad)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="adapter must be an Adapter"):
        swap_attention(build(), adapter="llama")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="an instance"):
        swap_attention(build(), adapter={ToyAttention: ToyAdapter})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="modules are missing"):
        unregister()


def test_every_file_of_adapters_is_in_the_table() -> None:
    folder = Path(inspect.getfile(registry)).parent / "hosts"
    assert sorted(CLASSES) == sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    paths = [path for paths in CLASSES.values() for path in paths]
    assert len(set(paths)) == len(paths)


def test_a_model_of_transformers_saved_with_an_adapter_of_ones_own(tmp_path: Path) -> None:
    pytest.importorskip("transformers", minversion="5.5", reason="needs the hf extra")
    from transformers.models.llama import modeling_llama

    from hypermlp.integrations.hosts.llama import LlamaAdapter
    from hypermlp.integrations.huggingface import from_pretrained
    from tests.integrations.huggingface.families import stock, tokens

    # a class that is called in the same way, of nobody's library
    mine = type("MyAttention", (modeling_llama.LlamaAttention,), {"forward": modeling_llama.LlamaAttention.forward})
    model: Any = stock("llama")
    for layer in model.model.layers:
        layer.self_attn.__class__ = mine
    with pytest.raises(ValueError, match="no attention"):
        swap_attention(model)
    given: dict[Any, Adapter] = {modeling_llama.LlamaAttention: LlamaAdapter()}
    swap_attention(model, adapter=given)
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path, adapter=given).eval()
    torch.testing.assert_close(again(tokens(1, 5)).logits, model(tokens(1, 5)).logits)


def test_what_goes_is_named(adapter: ToyAdapter) -> None:
    report = swap_attention(build(2))
    names = ("qkv.weight", "qkv.bias", "out.weight", "out.bias")
    assert [entry.gone for entry in report.swapped] == [names, names]
    assert "2 x ToyAttention: its parameters qkv.weight, qkv.bias, out.weight, out.bias go" in str(report)
    assert isinstance(ToyBlock().attention, ToyAttention)
