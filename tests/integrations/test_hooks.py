"""Hooks on a host's attention: those on its calls go on in its replacement, the others are named, and all come back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hypermlp import restore_attention, swap_attention
from hypermlp.integrations import Host
from hypermlp.layers import AttentionLayer
from tests.integrations.toy import ToyAdapter, ToyAttention, adapter, build

__all__ = ["adapter"]  # a fixture


def double_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
    return (args[0] * 2,)


def double_input_kwargs(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    return (args[0] * 2,), kwargs


def double_output(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    return out * 2


def double_output_kwargs(module: nn.Module, args: Any, kwargs: Any, out: Tensor) -> Tensor:
    return out * 2


def double_gradient(module: nn.Module, grad_input: tuple[Tensor, ...], *grad_output: Any) -> tuple[Tensor, ...]:
    return tuple(2 * grad for grad in grad_input)


REGISTER: dict[str, Callable[[nn.Module], Any]] = {
    "pre": lambda m: m.register_forward_pre_hook(double_input),
    "pre with kwargs": lambda m: m.register_forward_pre_hook(double_input_kwargs, with_kwargs=True),
    "forward": lambda m: m.register_forward_hook(double_output),
    "forward with kwargs": lambda m: m.register_forward_hook(double_output_kwargs, with_kwargs=True),
    "always": lambda m: m.register_forward_hook(double_output, always_call=True),
    "backward": lambda m: m.register_full_backward_hook(double_gradient),
    "backward pre": lambda m: m.register_full_backward_pre_hook(double_gradient),
}


def value(model: nn.Module, kind: str) -> Tensor:
    """What the hook doubles: the attention's output, or the gradient of its input."""
    x = torch.linspace(-1, 1, 80, dtype=torch.float64).view(1, 5, 16).requires_grad_()
    out: Tensor = model[0].attention(x)
    return torch.autograd.grad(out.sum(), x)[0] if "backward" in kind else out


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def doubled(model: nn.Module, kind: str) -> Tensor:
    """The value with a hook, of a model without one, by calling it otherwise."""
    if "pre" in kind and "backward" not in kind:
        x = torch.linspace(-1, 1, 80, dtype=torch.float64).view(1, 5, 16)
        out: Tensor = model[0].attention(2 * x)
        return out
    return 2 * value(model, kind)


@pytest.mark.parametrize("kind", REGISTER)
def test_hooks_on_calls_go_on(adapter: ToyAdapter, kind: str) -> None:
    model = build(1).double()
    bare = copy.deepcopy(model)
    stock, stock_doubled = value(model, kind), doubled(model, kind)
    handle = REGISTER[kind](model[0].attention)
    same(value(model, kind), stock_doubled)
    torch.manual_seed(0)
    report = swap_attention(model)
    torch.manual_seed(0)
    swap_attention(bare)
    assert report.hooks_left == ()
    same(value(model, kind), doubled(bare, kind))
    assert not torch.allclose(value(model, kind), value(bare, kind))
    other = copy.deepcopy(model)
    restore_attention(other)
    same(value(other, kind), stock_doubled)
    handle.remove()
    same(value(model, kind), value(bare, kind))
    restore_attention(model)
    same(value(model, kind), stock)


@pytest.mark.parametrize("kind", REGISTER)
def test_hooks_set_after_a_swap_stay(adapter: ToyAdapter, kind: str) -> None:
    model = build(1).double()
    stock, stock_doubled = value(model, kind), doubled(model, kind)
    swap_attention(model)
    handle = REGISTER[kind](model[0].attention)
    restore_attention(model)
    same(value(model, kind), stock_doubled)
    handle.remove()
    same(value(model, kind), stock)


def test_hooks_that_are_not_called_any_more_are_named(adapter: ToyAdapter) -> None:
    model = build()
    calls: list[str] = []
    model[0].attention.qkv.register_forward_hook(lambda *_: calls.append("qkv"))
    model[1].attention.register_state_dict_post_hook(lambda *_: calls.append("state"))
    model[2].attention.out.weight.register_hook(lambda grad: calls.append("weight"))
    model[2].attention.out.bias.register_post_accumulate_grad_hook(lambda p: calls.append("bias"))
    report = swap_attention(model)
    assert [tuple(entry) for entry in report.hooks_left] == [
        ("0.attention.qkv", "Linear", "hooks on its calls"),
        ("1.attention", "ToyAttention", "hooks on its state dict"),
        ("2.attention.out", "Linear", "hooks on its parameters"),
    ]
    assert "0.attention.qkv: Linear had hooks on its calls, not called now" in str(report)
    model(torch.randn(1, 5, 16)).sum().backward()
    model.state_dict()
    assert not calls
    restore_attention(model)
    model(torch.randn(1, 5, 16)).sum().backward()
    model.state_dict()
    assert sorted(calls) == ["bias", "qkv", "state", "weight"]


def test_a_replacement_with_hooks_of_its_own_keeps_them(adapter: ToyAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrap(self: ToyAdapter, layer: AttentionLayer, module: nn.Module, host: Host) -> nn.Module:
        layer.register_forward_pre_hook(double_input)
        return layer

    monkeypatch.setattr(ToyAdapter, "wrap", wrap)
    model = build(1).double()
    stock, calls = value(model, ""), []
    model[0].attention.register_forward_hook(lambda *_: calls.append(1))
    report = swap_attention(model)
    assert [tuple(entry) for entry in report.hooks_left] == [("0.attention", "ToyAttention", "hooks on its calls")]
    bare = copy.deepcopy(model[0].attention)
    bare._forward_pre_hooks.clear()
    x = torch.linspace(-1, 1, 80, dtype=torch.float64).view(1, 5, 16)
    same(model[0].attention(x), bare(2 * x))
    assert not calls
    restore_attention(model)
    assert isinstance(model[0].attention, ToyAttention)
    same(value(model, ""), stock)
    assert calls == [1]


class WithNorm(ToyAdapter):
    """Keeps a part of the host in its replacement."""

    class Kept(nn.Module):
        def __init__(self, out: nn.Module, mixer: AttentionLayer) -> None:
            super().__init__()
            self.kept, self.mixer = out, mixer

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.kept(self.mixer(x))
            return made

    def wrap(self, layer: AttentionLayer, module: Any, host: Host) -> nn.Module:
        return self.Kept(module.out, layer)


def test_hooks_on_a_part_that_stays_go_on() -> None:
    model, calls = build(1), []
    model[0].attention.out.register_forward_hook(lambda *_: calls.append("out"))
    model[0].attention.qkv.register_forward_hook(lambda *_: calls.append("qkv"))
    report = swap_attention(model, adapter={ToyAttention: WithNorm()})
    assert [entry.name for entry in report.hooks_left] == ["0.attention.qkv"]
    assert report.swapped[0].gone == ("qkv.weight", "qkv.bias")
    model(torch.randn(1, 3, 16))
    assert calls == ["out"]
