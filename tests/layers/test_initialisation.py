"""Deep stacks start with sane activations and gradients at every width."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hypermlp import HyperGLU, HyperMLP, ReLUAttention, SoftmaxAttention

LAYERS = [HyperGLU, HyperMLP, ReLUAttention, SoftmaxAttention]


class Stack(nn.Module):
    """Pre-norm residual stack of attention layers alone, and what each adds to the stream."""

    def __init__(self, cls, width: int, depth: int = 12, **options) -> None:
        super().__init__()
        options = {"max_lag": 64, "conv_size": 4} | options
        self.layers = nn.ModuleList([cls(width, **options) for _ in range(depth)])
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(depth)])
        self.added: list[float] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.added = []
        for layer, norm in zip(self.layers, self.norms, strict=True):
            y = layer(norm(x))
            self.added.append(y.detach().square().mean().sqrt().item())
            x = x + y
        return x


def start(cls, width: int, **options) -> tuple[list[float], list[float], float]:
    """What each layer adds, its gradient a parameter relative to the weights, and the last stream's size."""
    torch.manual_seed(0)
    stack = Stack(cls, width, **options)
    out = stack(torch.randn(2, 64, width))
    (out * torch.randn_like(out)).sum().backward()
    gradients = [
        max(
            (p.grad.norm() / p.detach().norm()).item()
            for p in layer.parameters()
            if p.ndim == 2 and p.shape[-1] == width
        )
        for layer in stack.layers
    ]
    return stack.added, gradients, float(out.detach().square().mean().sqrt())


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("width", [32, 128, 512])
def test_every_layer_adds_something_of_the_stream_s_size(cls, width):
    added, gradients, last = start(cls, width)
    # without gates nothing halves what an L2-normalised row of like values adds up to
    loudest = 5 if cls is ReLUAttention else 2
    assert all(0.05 < size < loudest for size in added), added
    assert 1 < last < 2 * loudest, last
    assert max(gradients) < 30 * min(gradients), "no layer learns far faster than another"


@pytest.mark.parametrize("cls", LAYERS)
def test_the_start_does_not_depend_on_the_width(cls):
    narrow, wide = (torch.tensor(start(cls, width)[0]).mean() for width in (32, 512))
    assert 0.4 < narrow / wide < 2.5


@pytest.mark.parametrize("cls", LAYERS[:2])
@pytest.mark.parametrize("width", [64, 256])
def test_the_paper_s_convolution_start_is_ten_times_quieter(cls, width):
    ours, paper = (torch.tensor(start(cls, width, conv_init=name)[0]).mean() for name in ("identity", "paper"))
    assert ours > 10 * paper


@pytest.mark.parametrize("cls", LAYERS)
def test_parameters_start_as_documented(cls):
    layer = cls(256, max_lag=128, conv_size=4, q_gate=True, output_gate=True, bias=True)
    expected = {"k_proj": 1 / 16, "v_proj": 1 / 16, "o_proj": 1 / 16, "gate.proj": 1 / 16}
    for name, std in expected.items():
        assert layer.get_submodule(name).weight.std().item() == pytest.approx(std, rel=0.05), name
        assert not layer.get_submodule(name).bias.any(), name
    taps = layer.k_conv.weight
    assert taps[:, -1].mean().item() == pytest.approx(1, abs=0.01)
    assert taps[:, :-1].std().item() == pytest.approx(0.02, rel=0.2)
    if hasattr(layer, "routing_mix"):
        assert not layer.routing_mix.diag.any()
        assert layer.readout_mix.up.std().item() == pytest.approx(0.02, rel=0.1)
