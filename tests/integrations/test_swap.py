"""``swap_attention`` on a host of its own: the registry, the report, errors that change nothing, the way back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import hypermlp
from hypermlp import HyperGLU, HyperMLP
from hypermlp.integrations import register, restore_attention, swap_attention
from hypermlp.integrations.swap import swapped_layers
from tests.integrations.toy import ToyAdapter, ToyAttention, ToyBlock, adapter, assert_unchanged, build, state

__all__ = ["adapter"]  # a fixture


def test_swapping_and_back(adapter: ToyAdapter) -> None:
    model = build()
    x = torch.randn(2, 9, 16)
    before, out = state(model), model(x)
    report = swap_attention(model, "hypermlp", mix_rank=4)
    assert [entry.name for entry in report.swapped] == ["0.attention", "1.attention", "2.attention"]
    assert all(isinstance(block.attention, HyperMLP) for block in model)
    assert model[0].attention.config.mix_rank == 4
    assert model[0].attention.config.max_lag == 32
    assert model(x).shape == out.shape
    assert not torch.allclose(model(x), out)
    assert report.parameters_before == sum(tensor.numel() for tensor in before[1].values())
    assert report.parameters_after == sum(parameter.numel() for parameter in model.parameters())
    assert f"{report.parameters_before:,} -> {report.parameters_after:,}" in str(report)
    assert restore_attention(model) == ("0.attention", "1.attention", "2.attention")
    assert_unchanged(model, before)
    assert torch.equal(model(x), out)
    assert [len(swaps) for swaps in adapter.told] == [1, 0]


@pytest.mark.parametrize(("layers", "places"), [([0], [0]), ([-1, 1], [1, 2]), (range(2), [0, 1]), (None, [0, 1, 2])])
def test_layers_are_counted_in_the_models_order(adapter: ToyAdapter, layers: Any, places: list[int]) -> None:
    model = build()
    report = swap_attention(model, layers=layers)
    assert [n for n, block in enumerate(model) if isinstance(block.attention, HyperGLU)] == places
    assert [entry.name for entry in report.left] == [f"{n}.attention" for n in range(3) if n not in places]
    assert adapter.told[-1][0]["layers"] == places


def test_layers_keep_their_place_after_a_first_swap(adapter: ToyAdapter) -> None:
    model = build()
    swap_attention(model, "hypermlp", layers=[0])
    report = swap_attention(model, "hyperglu", layers=[2])
    assert {entry.name: entry.reason for entry in report.left} == {
        "0.attention": "swapped before",
        "1.attention": "not among layers",
    }
    assert [type(layer).__name__ for layer in swapped_layers(model).values()] == ["HyperMLP", "HyperGLU"]
    assert [swap["layers"] for swap in adapter.told[-1]] == [[0], [2]]
    with pytest.raises(ValueError, match="swapped already"):
        swap_attention(model, layers=[0])
    swap_attention(model)
    with pytest.raises(ValueError, match=r"all attention .* swapped already"):
        swap_attention(model)
    assert len(restore_attention(model)) == 3


def test_what_is_left_alone_is_named(adapter: ToyAdapter) -> None:
    model = build()
    model[1].attention.leave = True
    report = swap_attention(model)
    assert [entry[:] for entry in report.left] == [("1.attention", "ToyAttention", "it asks to be")]
    assert "1.attention: ToyAttention left, it asks to be" in str(report)


def test_attention_without_an_adapter_is_named_too(adapter: ToyAdapter) -> None:
    class OtherAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner_attn = ToyAttention()

    class LinearAttention(nn.Linear): ...

    class OuterAttn(nn.Sequential): ...

    model = nn.Sequential(ToyBlock(), OtherAttention(), OuterAttn(LinearAttention(2, 2)))
    report = swap_attention(model)
    # the one that holds a known one is not what is left, and of nested ones the outer
    assert [entry.name for entry in report.swapped] == ["0.attention", "1.inner_attn"]
    assert [entry[:] for entry in report.left] == [("2", "OuterAttn", "no adapter is registered for its class")]


def test_device_dtype_and_mode_are_kept(adapter: ToyAdapter) -> None:
    model = build().to(torch.float64).eval()
    model[2].train()
    swap_attention(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert [block.attention.training for block in model] == [False, False, True]
    assert [part.training for part in model[0].modules()] == [False] * len(list(model[0].modules()))
    meta = build().to("meta")
    swap_attention(meta)
    assert {parameter.device.type for parameter in meta.parameters()} == {"meta"}


def test_a_module_used_twice_stays_one(adapter: ToyAdapter) -> None:
    model = build()
    model[2].attention = model[0].attention
    report = swap_attention(model)
    assert len(report.swapped) == 2
    assert model[2].attention is model[0].attention
    restore_attention(model)
    assert model[2].attention is model[0].attention


def test_originals_are_not_part_of_the_model(adapter: ToyAdapter) -> None:
    model = build()
    swap_attention(model)
    assert not [name for name, _ in model.named_parameters() if "qkv" in name]
    assert not [name for name in model.state_dict() if "qkv" in name]
    freed = build()
    swap_attention(freed, keep_originals=False)
    with pytest.raises(ValueError, match="keep_originals=False"):
        restore_attention(freed)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "mixer": ({"mixer": "mamba"}, "mixer must be one of"),
    "init": ({"init": "zeros"}, "init must be one of"),
    "layer": ({"layers": [3]}, "layers must be among 0 to 2.*got 3"),
    "no layer": ({"layers": []}, "layers is empty"),
    "one layer": ({"layers": 0}, r"write layers=\[0\]"),
    "not a number": ({"layers": ["0"]}, "layers must be among"),
    "option": ({"width": 3}, "width"),
    "value": ({"num_heads": 3}, r"0\.attention \(ToyAttention\): .* does not divide into 3 heads"),
    "backend": ({"backend": "cuda"}, "backend must be one of .*got 'cuda'"),
    "of the host": ({"hidden_size": 8}, "hidden_size is taken from the model"),
    "heads": ({"init": "from_attention", "num_heads": 2}, "num_heads=2 .* keeps the host's 4"),
    "bias": ({"init": "from_attention", "bias": False}, "bias=False"),
    "too wide": ({"init": "from_attention", "qk_dim": 64}, "8 channels and the host's heads have 4"),
}


@pytest.mark.parametrize("kwargs", BAD)
def test_an_error_changes_nothing(adapter: ToyAdapter, kwargs: str) -> None:
    arguments, message = BAD[kwargs]
    model = build()
    before = state(model)
    with pytest.raises((ValueError, TypeError), match=message):
        swap_attention(model, **arguments)
    assert_unchanged(model, before)


def test_another_class_of_the_same_name_is_refused(adapter: ToyAdapter) -> None:
    stranger = type("ToyAttention", (nn.Module,), {})
    with pytest.raises(ValueError, match=r"0 is not the ToyAttention that its adapter knows: .*'width'"):
        swap_attention(nn.Sequential(stranger()))


def test_an_error_in_the_last_layer_changes_nothing(adapter: ToyAdapter) -> None:
    model = build()
    model[2].attention.qkv.to(torch.float64)
    before = state(model)
    with pytest.raises(ValueError, match=r"2\.attention .* 2 places or dtypes"):
        swap_attention(model)
    assert_unchanged(model, before)


def test_an_error_after_the_last_layer_changes_nothing(adapter: ToyAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise RuntimeError("the host will not have it")

    monkeypatch.setattr(ToyAdapter, "finish", refuse)
    model = build()
    before = state(model)
    with pytest.raises(RuntimeError, match="will not have it"):
        swap_attention(model)
    assert_unchanged(model, before)


def test_swapping_as_it_goes_would_be_noticed(adapter: ToyAdapter) -> None:
    model = build()
    before = state(model)
    swap_attention(model, layers=[0])
    with pytest.raises(AssertionError):
        assert_unchanged(model, before)


def test_an_unknown_model_is_told_what_was_seen() -> None:
    class StrangeAttention(nn.Module): ...

    model = nn.Sequential(nn.Linear(2, 2), StrangeAttention())
    with pytest.raises(ValueError, match=r"Classes seen: [\w.<>]+StrangeAttention\. Known: .*GPT2Attention.*register"):
        swap_attention(model)
    with pytest.raises(ValueError, match=r"nothing to restore|no attention"):
        restore_attention(model)


def test_the_attention_itself_cannot_be_the_model(adapter: ToyAdapter) -> None:
    with pytest.raises(ValueError, match="itself a ToyAttention"):
        swap_attention(ToyAttention())
    with pytest.raises(ValueError, match="nothing to restore"):
        restore_attention(build())


def test_register_checks_its_arguments() -> None:
    with pytest.raises(TypeError, match="an instance"):
        register(ToyAdapter, "ToyAttention")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="modules are missing"):
        register(ToyAdapter())


class Packed(torch.Tensor):
    """Weights of another library's kind, which say that they are float32."""


def integers() -> nn.Module:
    """As bitsandbytes keeps them."""
    attention = ToyAttention()
    attention.qkv.weight = nn.Parameter(torch.zeros(48, 16, dtype=torch.uint8), requires_grad=False)
    attention.out.weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.uint8), requires_grad=False)
    return attention


def eights() -> nn.Module:
    return ToyAttention().to(torch.float8_e4m3fn)


def subclass() -> nn.Module:
    """As torchao keeps them."""
    attention = ToyAttention()
    attention.qkv.weight = nn.Parameter(torch.zeros(48, 16).as_subclass(Packed))
    return attention


def buffers() -> nn.Module:
    """As GPTQ and AWQ keep them."""
    attention = ToyAttention()
    for linear in (attention.qkv, attention.out):
        linear.weight = None
        linear.register_buffer("qweight", torch.zeros(2, 16, dtype=torch.int32))
    return attention


@pytest.mark.parametrize("init", ["fresh", "from_attention"])
@pytest.mark.parametrize(
    ("make", "what"),
    [(integers, "uint8"), (eights, "float8_e4m3fn"), (subclass, "Packed"), (buffers, "integers in qkv.qweight")],
)
def test_quantised_weights_are_refused(adapter: ToyAdapter, make: Any, what: str, init: Any) -> None:
    model = build(1)
    model[0].attention = make()
    with pytest.raises(ValueError, match=rf"quantised \(.*{what}.*dequantise it"):
        swap_attention(model, init=init)


def test_a_model_in_data_parallel_is_refused(adapter: ToyAdapter, tmp_path: Path) -> None:
    """Parameters that come later have gradients of one process alone, and nothing says so."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model = build()
        wrapped = nn.parallel.DistributedDataParallel(model)
        with pytest.raises(ValueError, match="wrap it afterwards"):
            swap_attention(wrapped)
        swap_attention(model)
        with pytest.raises(ValueError, match="wrap it afterwards"):
            restore_attention(nn.parallel.DistributedDataParallel(model))
    finally:
        dist.destroy_process_group()


def test_copies_can_be_restored(adapter: ToyAdapter) -> None:
    model = build()
    x = torch.randn(1, 5, 16)
    out = model(x)
    swap_attention(model)
    other = copy.deepcopy(model)
    restore_attention(other)
    assert torch.equal(other(x), out)
    assert isinstance(model[0].attention, HyperGLU)


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'swap'"):
        hypermlp.swap  # noqa: B018
