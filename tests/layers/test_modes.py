"""What PyTorch may do with a call besides running it: every mode, for everything that a layer could want to read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from hypermlp import HyperCache, HyperGLU, HyperMLP, SoftmaxAttention
from tests.helpers import assert_close
from tests.quick import combinations

WIDTH, LENGTH = 16, 7


def build(cls: type = HyperGLU, **options: Any) -> Any:
    torch.manual_seed(0)
    settings = {"qk_dim": 8, "max_lag": 12, "layer_idx": 0, "dtype": torch.float64, "conv_size": 4}
    layer = cls(WIDTH, **(settings | options)).requires_grad_(False)
    for p in layer.parameters():
        p.add_(0.1 * torch.randn_like(p))
    return layer


class Call(nn.Module):
    """A layer called in a way that modes can see through: as a module of tensors."""

    def __init__(self, layer: nn.Module, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layer, self.run = layer, run

    def forward(self, *args: Tensor) -> Tensor:
        return self.run(self.layer, *args)


def with_mask(layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    return layer(x, mask)


def packed(layer: nn.Module, x: Tensor, bounds: Tensor) -> Tensor:
    return layer(x, cu_seqlens=bounds)


def cached(layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """A prompt, a block and a token, masks of all tokens and of the new ones."""
    cache = HyperCache()
    prompt, block = layer(x[:, :3], mask[:, :3], cache=cache), layer(x[:, 3:6], mask[:, :6], cache=cache)
    return torch.cat((prompt, block, layer(x[:, 6:], mask[:, 6:], cache=cache)), dim=1)


def static(layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    cache = HyperCache(static=True, max_length=9)
    parts = [layer(x[:, :5], mask[:, :5], cache=cache)]
    parts += [layer(x[:, i : i + 1], mask[:, : i + 1], cache=cache) for i in (5, 6)]
    return torch.cat(parts, dim=1)


def packed_then_steps(layer: nn.Module, x: Tensor, bounds: Tensor) -> Tensor:
    cache = HyperCache()
    parts = [layer(x, cu_seqlens=bounds, cache=cache), layer(x[0, :2, None], cache=cache)]
    return torch.cat([part.flatten() for part in parts])


X = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
MASK = torch.ones(2, LENGTH, dtype=torch.long)
MASK[0, :2] = MASK[1, 3] = 0
BOUNDS = torch.tensor([0, 3, LENGTH], dtype=torch.int32)

CASES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], dict[str, Any]]] = {
    "mask": (with_mask, (X, MASK), {}),
    "mask, rotated": (with_mask, (X, MASK), {"rope": True}),
    "mask, bidirectional": (with_mask, (X, MASK), {"causal": False}),
    "mask, by position": (with_mask, (X, MASK), {"layout": "position", "cls": HyperMLP}),
    "mask, softmax": (with_mask, (X, MASK), {"cls": SoftmaxAttention}),
    "bounds": (packed, (X[:1], BOUNDS), {}),
    "bounds, rotated": (packed, (X[:1], BOUNDS), {"rope": True}),
    "bounds, by position": (packed, (X[:1], BOUNDS), {"layout": "position"}),
    "bounds, softmax": (packed, (X[:1], BOUNDS), {"cls": SoftmaxAttention}),
    "cache": (cached, (X, MASK), {}),
    "cache, rotated": (cached, (X, MASK), {"rope": True}),
    "cache, by position": (cached, (X, MASK), {"layout": "position"}),
    "cache, window": (cached, (X, MASK), {"max_lag": 3}),
    "static cache": (static, (X, MASK), {"max_lag": 4}),
    "cache of rows that were packed": (packed_then_steps, (X[:1], BOUNDS), {}),
}


def _fake(call: Call, *args: Tensor) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = call(*(mode.from_tensor(x) for x in args))
    assert out.shape == call(*args).shape


def _meta(call: Call, *args: Tensor) -> None:
    expected = call(*args).shape
    assert call.to("meta")(*(x.to("meta") for x in args)).shape == expected


def _compile(call: Call, *args: Tensor) -> Tensor:
    torch._dynamo.reset()
    return torch.compile(call, backend="aot_eager", fullgraph=True)(*args)


def _export(strict: bool) -> Callable[..., Tensor]:
    return lambda call, *args: torch.export.export(call, args, strict=strict).module()(*args)


def _fx(mode: str) -> Callable[..., Tensor]:
    def run(call: Call, *args: Tensor) -> Tensor:
        state = dict(call.named_parameters())

        def whole(state: dict[str, Tensor], *args: Tensor) -> Tensor:
            return torch.func.functional_call(call, state, args)

        return make_fx(whole, tracing_mode=mode)(state, *args)(state, *args)

    return run


def _vmap(call: Call, *args: Tensor) -> Tensor:
    """The same inputs, and others before them in the batch."""
    others = [x.flip(0) if x.is_floating_point() else x for x in args]
    out: Tensor = torch.func.vmap(call)(*(torch.stack(pair) for pair in zip(others, args, strict=True)))[1]
    return out


MODES: dict[str, Callable[..., Any]] = {
    "FakeTensorMode": _fake,
    "meta": _meta,
    "compile": _compile,
    "export": _export(strict=False),
    "strict export": _export(strict=True),
    "make_fx": _fx("real"),
    "make_fx, symbolic": _fx("symbolic"),
    "vmap": _vmap,
    "functionalize": lambda call, *args: torch.func.functionalize(call)(*args),
    "trace": lambda call, *args: torch.jit.trace(call, args, check_trace=False)(*args),
}


# of the modes that take seconds: every case once, and every mode with a mask, with bounds and with a cache
DEAR = {
    "compile": ("mask", "mask, softmax", "bounds, rotated", "static cache"),
    "export": (
        "mask, bidirectional", "bounds, by position", "bounds, softmax", "cache", "cache, rotated",
        "cache, by position",
    ),
    "strict export": ("mask, rotated", "bounds", "cache of rows that were packed"),
    "make_fx, symbolic": ("mask, by position", "cache, window"),
}  # fmt: skip


# and some of these: make_fx with symbols has the others, or their like
FEWER = {"make_fx": ("mask", "mask, softmax", "bounds, rotated", "cache", "static cache")}


def test_every_case_is_in_a_dear_mode() -> None:
    assert sorted(case for cases in DEAR.values() for case in cases) == sorted(CASES)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("case", "mode"), combinations(CASES, MODES, quick=lambda case, mode: case in (DEAR | FEWER).get(mode, CASES))
)
def test_every_mode_gives_the_eager_values(case: str, mode: str) -> None:
    run, args, options = CASES[case]
    call = Call(build(**options), run)
    expected = call(*args)
    if mode == "trace" and "cache" in case:
        with pytest.raises(RuntimeError, match="trace without cache="):
            MODES[mode](call, *args)
        return
    found = MODES[mode](call, *args)
    if found is not None:
        assert_close({"output": found}, {"output": expected}, rtol=1e-10)


@pytest.mark.parametrize("case", [name for name in CASES if "cache" not in name])
def test_gradients_of_samples_equal_those_one_by_one(case: str) -> None:
    run, (x, seen), options = CASES[case]
    call = Call(build(**options), run)

    def loss(x: Tensor, seen: Tensor) -> Tensor:
        return call(x, seen).square().sum()

    xs = torch.stack((x.flip(0), x))
    found = torch.func.vmap(torch.func.grad(loss))(xs, torch.stack((seen, seen)))
    for one, grad in zip(xs, found, strict=True):
        one = one.clone().requires_grad_()
        loss(one, seen).backward()
        assert one.grad is not None
        assert_close({"gradient": grad}, {"gradient": one.grad}, rtol=1e-10)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*:DeprecationWarning")
@pytest.mark.parametrize("case", [name for name in CASES if "cache" not in name])
def test_a_traced_layer_serves_other_lengths_and_masks(case: str) -> None:
    run, (x, seen), options = CASES[case]
    call = Call(build(**options), run)
    traced = torch.jit.trace(call, (x, seen), check_trace=False)
    assert not [node for node in traced.inlined_graph.nodes() if node.kind().startswith("hypermlp::")]
    for length in (4, 20):
        if length > 12 and ("by position" in case or "bidirectional" in case):
            continue
        x = torch.randn(3 if "mask" in case else 1, length, WIDTH, dtype=torch.float64)
        if "mask" in case:
            seen = (torch.rand(3, length) < 0.7).long()
        else:
            seen = torch.tensor([0, 1, 3, length], dtype=torch.int32)
        assert_close({"output": traced(x, seen)}, {"output": call(x, seen)}, rtol=1e-10)
