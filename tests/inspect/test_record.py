"""One forward is recorded, of any model with these layers, and changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hypermlp import HyperCache, HyperConfig, HyperGLU, inspect
from hypermlp.layers import AttentionLayer
from hypermlp.models import LanguageModel, LanguageModelConfig
from tests.helpers import error

WIDTH = 16


def language_model(mixer: str = "hyperglu") -> LanguageModel:
    torch.manual_seed(0)
    attention = HyperConfig(WIDTH, mixer=mixer, max_lag=7, **({"mix_rank": 2} if "hyper" in mixer else {}))
    model = LanguageModel(LanguageModelConfig(50, WIDTH, 2, attention), dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def check_outputs(model: nn.Module, *args: Tensor, **kwargs: Tensor) -> list[inspect.LayerCall]:
    """Weights times values, through each layer's own projections, are what each layer gave."""
    given: list[Tensor] = []
    layers = [module for module in model.modules() if isinstance(module, AttentionLayer)]
    handles = [layer.register_forward_hook(lambda *parts: given.append(parts[-1])) for layer in layers]
    calls = inspect.record(model, *args, **kwargs)
    for handle in handles:
        handle.remove()
    assert [call.layer for call in calls] == layers
    for call, expected in zip(calls, given, strict=True):
        maps = inspect.head_maps(call)
        tokens = call.layer.tokens(*call[2:])
        x = tokens.zeroed(call.hidden_states)
        _, _, v, gates = call.layer.streams(x, tokens)
        lags = torch.arange(maps.weights.shape[-1])
        keys = (torch.arange(x.shape[1])[:, None] - lags).clamp_min(0)
        read = torch.einsum("bhtc,btchv->bthv", maps.weights, v[:, keys]).flatten(2)
        assert error(tokens.zeroed(call.layer.output(read, gates)), expected) < 1e-10
    return calls


@pytest.mark.parametrize("mixer", ["hyperglu", "hypermlp", "relu", "softmax"])
def test_language_model(mixer: str) -> None:
    model, ids = language_model(mixer), torch.randint(50, (2, 12))
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, :4] = mask[0, 5] = False
    calls = check_outputs(model, ids, mask)
    assert [call.name for call in calls] == ["blocks.0.attention", "blocks.1.attention"]
    packed = check_outputs(model, ids[:1], cu_seqlens=torch.tensor([0, 5, 12]))
    assert packed[0].cu_seqlens is not None


def test_a_layer_alone_and_one_that_runs_twice() -> None:
    layer, x = HyperGLU(WIDTH, max_lag=9), torch.randn(1, 5, WIDTH)
    (call,) = inspect.record(layer, hidden_states=x)
    assert call.name == ""
    assert torch.equal(call.hidden_states, x)
    twice = nn.Sequential(layer, layer)
    assert [call.name for call in inspect.record(twice, x)] == ["0", "0"]


def test_what_runs_later_does_not_change_what_was_recorded() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = HyperGLU(WIDTH, max_lag=9)

        def forward(self, x: Tensor) -> Tensor:
            return x.add_(self.attention(x))

    x = torch.randn(1, 5, WIDTH)
    (call,) = inspect.record(InPlace(), x.clone())
    assert torch.equal(call.hidden_states, x)


def test_nothing_is_left_behind() -> None:
    model, ids = language_model(), torch.randint(50, (1, 12))
    model.train()
    model.blocks[1].eval()  # frozen by its owner
    modes = {name: module.training for name, module in model.named_modules()}
    before, state = model(ids), copy.deepcopy(model.state_dict())
    calls = inspect.record(model, ids)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert torch.equal(model(ids), before)
    assert torch.is_grad_enabled()
    assert not any(call.hidden_states.requires_grad for call in calls)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_is_off_and_the_mode_comes_back_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(0.9), HyperGLU(WIDTH, max_lag=9)).train()
    x = torch.randn(1, 5, WIDTH)
    assert torch.equal(inspect.record(model, x)[0].hidden_states, x)
    with pytest.raises(ValueError, match="hidden_states"):
        inspect.record(model, x[..., :3])
    assert model[0].training
    assert not model[1]._forward_pre_hooks


class Switches(nn.Module):
    """A model that puts a part of itself into training when it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.layer = nn.Dropout(), HyperGLU(8, max_lag=16)

    def forward(self, x: Tensor) -> Tensor:
        self.part.train()
        return self.layer(x)


def test_a_mode_that_the_model_itself_changes_comes_back() -> None:
    model = Switches().eval()
    inspect.record(model, torch.randn(1, 3, 8))
    assert not any(module.training for module in model.modules())


def test_a_compiled_model_is_recorded() -> None:
    layer, x = HyperGLU(WIDTH, max_lag=9), torch.randn(1, 5, WIDTH)
    compiled = torch.compile(layer, backend="eager")
    with torch.no_grad():
        compiled(x)
    assert len(inspect.record(compiled, x)) == 1


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="no attention layer of this library was called in Linear"):
        inspect.record(nn.Linear(3, 3), torch.randn(2, 3))
    model, ids, cache = language_model(), torch.randint(50, (1, 4)), HyperCache()
    inspect.record(model, ids, cache=HyperCache())
    with torch.no_grad():
        model(ids, cache=cache)
    with pytest.raises(ValueError, match=r"blocks\.0\.attention was called with a cache of earlier tokens"):
        inspect.record(model, ids, cache=cache)


def test_swapped_gpt2_and_the_native_family() -> None:
    pytest.importorskip("transformers", minversion="5.5", reason="needs the extra hf")
    from tests.integrations.huggingface.hosts import swapped, tokens
    from tests.models.families import tiny

    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, :3] = 0
    host = swapped("gpt2", max_lag=6)
    calls = check_outputs(host, tokens(2, 10), attention_mask=mask)
    assert [call.name for call in calls] == [f"transformer.h.{index}.attn.mixer" for index in range(2)]
    assert not inspect.head_maps(calls[0]).valid[0, :3].any()
    family = tiny()
    for options in ({}, {"use_cache": False}, {"output_attentions": True}):
        calls = check_outputs(family, tokens(2, 10) % 37, attention_mask=mask, **options)
        assert calls[1].attention_mask is not None
