"""A host of our own, and its adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypermlp.integrations import Adapter, Host, Projection, Projections, register, registry


class ToyAttention(nn.Module):
    """Softmax attention called as ``attention(x)``."""

    def __init__(self, width: int = 16, heads: int = 4, causal: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.width, self.heads, self.causal = width, heads, causal
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        o: Tensor = self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))
        return o


class ToyBlock(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(16), ToyAttention(**options)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.attention(self.norm(x))
        return out


class ToyAdapter(Adapter):
    def __init__(self) -> None:
        self.told: list[list[dict[str, Any]]] = []

    def describe(self, module: Any) -> Host:
        return Host(
            hidden_size=module.width, num_heads=module.heads, causal=module.causal, max_length=32,
            projections=lambda: self.projections(module),
        )  # fmt: skip

    def skip(self, module: Any) -> str | None:
        return "it asks to be" if getattr(module, "leave", False) else None

    def finish(self, model: nn.Module, swaps: Sequence[Mapping[str, Any]]) -> None:
        self.told.append([dict(swap) for swap in swaps])

    @staticmethod
    def projections(module: Any) -> Projections:
        biases = module.qkv.bias.chunk(3) if module.qkv.bias is not None else (None,) * 3
        parts = [
            Projection.of(weight, bias, module.heads)
            for weight, bias in zip(module.qkv.weight.chunk(3), biases, strict=True)
        ]
        scaling = (module.width // module.heads) ** -0.5
        return Projections(parts[0], parts[1], parts[2], (module.out.weight, module.out.bias), scaling)


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Iterator[ToyAdapter]:
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    toy = ToyAdapter()
    register(toy, "ToyAttention")
    return toy


def build(layers: int = 3, **options: Any) -> nn.Sequential:
    return nn.Sequential(*(ToyBlock(**options) for _ in range(layers)))


def state(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, Tensor]]:
    return dict(model.named_modules()), {name: x.clone() for name, x in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: tuple[dict[str, nn.Module], dict[str, Tensor]]) -> None:
    modules, tensors = state(model)
    assert list(modules) == list(before[0])
    assert all(modules[name] is before[0][name] for name in modules)
    assert tensors.keys() == before[1].keys()
    assert all(torch.equal(tensors[name], before[1][name]) for name in tensors)
