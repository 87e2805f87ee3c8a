"""Hosts whose weights a library has quantised: hyper layers start from what that library turns them back to.

The libraries themselves are tested where they are installed (``make test-quantised``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hypermlp import restore_attention, swap_attention
from tests.integrations.toy import ToyAdapter, ToyBlock, adapter

__all__ = ["adapter"]  # a fixture


class Eighths(Tensor):
    """Weights kept in eighths, as a library of quantised tensors would, which says float32."""

    def dequantize(self) -> Tensor:
        return self.as_subclass(Tensor) / 8


class Broken(Tensor):
    def dequantize(self) -> Tensor:
        raise NotImplementedError("not on this device")


def quantise(module: nn.Module, kind: type[Tensor]) -> None:
    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.weight = nn.Parameter((8 * part.weight.detach()).as_subclass(kind))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(ToyBlock(), ToyBlock())


def test_it_starts_from_the_weights_turned_back(adapter: ToyAdapter, model: nn.Module) -> None:
    """A softmax layer that starts from them is the host with those weights."""
    x = torch.randn(2, 7, 16)
    expected = model(x)
    quantise(model, Eighths)
    before = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    swap_attention(model, "softmax", init="from_attention")
    assert torch.allclose(model(x), expected, atol=1e-5)
    restore_attention(model)
    assert isinstance(model[0].attention.qkv.weight, Eighths)  # type: ignore[union-attr, index]
    for name, weight in model.state_dict().items():
        assert torch.equal(weight.as_subclass(Tensor), before[name].as_subclass(Tensor))


def test_a_fresh_layer_takes_the_dtype_that_they_had(adapter: ToyAdapter, model: nn.Module) -> None:
    quantise(model, Eighths)
    report = swap_attention(model)
    assert {parameter.dtype for entry in report.swapped for parameter in entry.layer.parameters()} == {torch.float32}
    model(torch.randn(2, 7, 16)).sum().backward()


def test_weights_that_cannot_be_turned_back_are_refused(adapter: ToyAdapter, model: nn.Module) -> None:
    quantise(model[1], Broken)
    parts = dict(model.named_modules())
    with pytest.raises(
        ValueError, match=r"^1\.attention .*Broken does not turn back weight .*not on this device.*swap"
    ):
        swap_attention(model, init="from_attention")
    assert dict(model.named_modules()) == parts


def small(name: str, dtype: torch.dtype, folder: Path, **options: Any) -> Any:
    """A small transformers model, saved and opened again with ``options``."""
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, dict[str, Any]] = {
        "llama": {
            "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 64, "max_position_embeddings": 32, "attention_bias": True,
        },
        "gpt2": {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 32},
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(name, vocab_size=67, **sizes[name])
    transformers.AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


def check_softmax(model: Any, plain: Any, tolerance: float) -> None:
    """A softmax layer started from a quantised host: its values are those of attention with the weights turned back."""
    ids = torch.arange(1, 11)[None]
    attention = next(name for name, _ in plain.named_modules() if name.endswith((".attn", ".self_attn")))
    found: list[Tensor] = []
    swap_attention(model, "softmax", init="from_attention")
    for host in (plain, model):
        host.get_submodule(attention).register_forward_hook(lambda module, args, out: found.append(out[0].float()))
        with torch.no_grad():
            host(ids, use_cache=False)
    expected, made = found
    assert float((made - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("called", [False, True], ids=["new", "called before"])
def test_bitsandbytes(tmp_path: Path, name: str, bits: int, called: bool) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig

    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if bits == 4 else {"load_in_8bit": True}
    given = {"quantization_config": BitsAndBytesConfig(**options), "device_map": "cpu"}
    model, plain = (small(name, torch.bfloat16, tmp_path, **given) for _ in range(2))
    if called:
        model(torch.arange(5)[None])
    check_softmax(model, plain.dequantize(), 2e-2)  # eight bits of bfloat16, several times
    layer = next(part for part in model.modules() if hasattr(part, "mixer")).mixer
    assert layer.q_proj.weight.dtype == torch.bfloat16


def test_saved_with_quantised_weights_beside_it(tmp_path: Path) -> None:
    """Opened again the layers are plain, the rest quantised, and nothing has changed."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig

    from hypermlp.integrations.huggingface import from_pretrained

    given = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True), "device_map": "cpu"}
    model = small("llama", torch.bfloat16, tmp_path / "stock", **given)
    swap_attention(model, init="from_attention")
    model.save_pretrained(tmp_path / "swapped")
    again: Any = from_pretrained(tmp_path / "swapped", device_map="cpu").eval()
    assert again.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(again(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_torchao(tmp_path: Path, kind: str) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = small("llama", torch.float32, tmp_path)
    quantization.quantize_(model, getattr(quantization, kind)())
    plain = small("llama", torch.float32, tmp_path)
    for name, part in plain.named_modules():
        if isinstance(part, nn.Linear):
            part.weight = nn.Parameter(model.get_submodule(name).weight.dequantize())
    check_softmax(model, plain, 1e-4)
    restore_attention(model)
    assert "torchao" in type(model.model.layers[0].self_attn.q_proj.weight).__module__


def test_quanto(tmp_path: Path) -> None:
    quanto = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    model = small("llama", torch.float32, tmp_path)
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    plain = small("llama", torch.float32, tmp_path)
    for name, part in plain.named_modules():
        if isinstance(part, nn.Linear):
            part.weight = nn.Parameter(model.get_submodule(name).weight.dequantize())
    check_softmax(model, plain, 1e-4)
