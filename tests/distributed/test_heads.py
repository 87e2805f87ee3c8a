"""Attention layers whose heads are spread over two processes equal the whole layer."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hypermlp import HyperCache, HyperConfig, MixConfig, build_layer
from hypermlp.distributed import clip_grad_norm_, full_state_dict, shard_heads
from hypermlp.distributed.heads import CopiedConv
from hypermlp.generation import generate
from hypermlp.layers import AttentionLayer
from hypermlp.models import LanguageModel, LanguageModelConfig
from tests.distributed.processes import run_checks
from tests.helpers import Evaluated, assert_close, error, evaluate_layer

HIDDEN, TOKENS = 12, 9
RTOL = 1e-10
LAYERS: dict[str, dict[str, Any]] = {
    "hyperglu": {"mixer": "hyperglu", "num_heads": 4, "qk_dim": 16, "mix_rank": 3, "max_lag": 6, "bias": True},
    "hyperglu of one head each": {"mixer": "hyperglu", "num_heads": 2, "qk_dim": 12, "mix_rank": 2, "rope": False},
    "hyperglu without some parts": {
        "mixer": "hyperglu", "num_heads": 2, "qk_dim": 8, "max_lag": 20, "q_gate": False, "readout_mix": False,
        "routing_mix": MixConfig(rank=3, diag=False), "conv_size": 0,
    },
    "hypermlp": {"mixer": "hypermlp", "num_heads": 4, "qk_dim": 8, "v_dim": 20, "max_lag": 20, "rope": True},
    "bidirectional": {"mixer": "hypermlp", "num_heads": 2, "qk_dim": 8, "max_lag": 20, "causal": False},
    "relu": {"mixer": "relu", "num_heads": 2, "conv_size": 3, "output_gate": True},
    "softmax": {"mixer": "softmax", "num_heads": 4, "qk_dim": 8, "rope": True, "bias": True},
    "softmax with convolutions": {"mixer": "softmax", "num_heads": 2, "conv_size": 4, "q_gate": True, "max_lag": 5},
}  # fmt: skip
INPUTS = ("whole rows", "padded", "packed")


def layer_of(name: str, seed: int = 0) -> AttentionLayer:
    """A layer no parameter of which is at a start that would hide a mistake."""
    torch.manual_seed(seed)
    config = HyperConfig(hidden_size=HIDDEN, **({"max_lag": 8} | LAYERS[name]))
    return randomised(build_layer(config, layer_idx=0, dtype=torch.float64))


def randomised(module: Any) -> Any:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


def sharded(name: str) -> AttentionLayer:
    layer = layer_of(name)
    shard_heads(layer)
    return layer


def inputs(kind: str) -> dict[str, Any]:
    if kind == "padded":
        mask = torch.ones(2, TOKENS, dtype=torch.bool)
        mask[0, :3] = mask[1, 4:6] = mask[1, -1] = False
        return {"attention_mask": mask}
    return {"cu_seqlens": torch.tensor([0, 4, TOKENS])} if kind == "packed" else {}


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def evaluated(layer: AttentionLayer, kind: str) -> Evaluated:
    """Output and gradients, those of parameters put together again."""
    batch = 1 if kind == "packed" else 2
    found = evaluate_layer(layer, normal(batch, TOKENS, HIDDEN), normal(batch, TOKENS, HIDDEN, seed=2), **inputs(kind))
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(found.shared[name])
    return found._replace(shared=full_state_dict(layer))


def check_gradients(name: str, kind: str) -> None:
    assert_close(evaluated(sharded(name), kind).named(), evaluated(layer_of(name), kind).named(), RTOL)


def check_unsummed_convolutions_are_seen() -> None:
    """The comparison above sees what is wrong if each process keeps its part of the taps' gradients."""
    with mock.patch.object(CopiedConv, "taps", property(lambda self: self.weight)):
        found = evaluated(sharded("hyperglu"), "whole rows")
    expected = evaluated(layer_of("hyperglu"), "whole rows").named()
    wrong = [name for name, x in found.named().items() if error(x, expected[name]) > 1e-3]
    assert wrong == ["gradient of k_conv.weight", "gradient of v_conv.weight"]


def check_second_gradients() -> None:
    def penalty(layer: AttentionLayer) -> Tensor:
        x = normal(1, 5, HIDDEN).requires_grad_()
        (slope,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(slope.square().sum(), x)
        return second

    name = "softmax with convolutions"
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        found, expected = penalty(sharded(name)), penalty(layer_of(name))
    assert_close({"second": found}, {"second": expected}, RTOL)


@torch.no_grad()
def check_cache(name: str, static: bool) -> None:
    """A prompt with a padded row, two single tokens, then a block (a static cache: one more)."""
    layer, whole, x = sharded(name), layer_of(name), normal(2, TOKENS, HIDDEN)
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    mask[1, :2] = False
    cache, whole_cache = (HyperCache(static=static, max_length=TOKENS if static else None) for _ in range(2))
    bounds = [0, 5, 6, 7, 8 if static else TOKENS]
    parts = [slice(start, stop) for start, stop in pairwise(bounds)]
    found = torch.cat([layer(x[:, at], mask[:, at], cache=cache) for at in parts], dim=1)
    torch.cat([whole(x[:, at], mask[:, at], cache=whole_cache) for at in parts], dim=1)
    expected = whole(x, mask)[:, : bounds[-1]]
    assert_close({"output": found}, {"output": expected}, RTOL)
    assert layer.cache_spec.numbers_per_token * 2 == whole.cache_spec.numbers_per_token
    with pytest.raises(ValueError, match="filled by another layer"):
        layer(x[:, :1], cache=whole_cache)


def check_state_is_put_together() -> None:
    for name in LAYERS:
        whole = layer_of(name).state_dict()
        found = full_state_dict(sharded(name))
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[key], x) for key, x in whole.items())
        layer_of(name, seed=1).load_state_dict(found)


def check_first_process_decides() -> None:
    layer = layer_of("hyperglu", seed=dist.get_rank())
    shard_heads(layer)
    whole, found = layer_of("hyperglu").state_dict(), full_state_dict(layer)
    assert all(torch.equal(found[key], x) for key, x in whole.items())


def check_groups() -> None:
    mesh = dist.device_mesh.init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "heads"))
    x = normal(1, 4, HIDDEN)
    expected = layer_of("relu")(x)
    found = {}
    for name, group in {"mesh": mesh["heads"], "group": mesh.get_group("heads"), "alone": mesh["data"]}.items():
        layer = layer_of("relu")
        shard_heads(layer, group)
        found[name] = layer(hidden_states=x)
        assert layer.config.num_heads == (2 if name == "alone" else 1)
    assert_close(found, dict.fromkeys(found, expected), RTOL)
    with pytest.raises(ValueError, match="one dimension"):
        shard_heads(layer_of("relu"), mesh)
    with pytest.raises(TypeError, match="group must be"):
        shard_heads(layer_of("relu"), "heads")  # type: ignore[arg-type]


def check_errors() -> None:
    three = build_layer(HyperConfig(hidden_size=HIDDEN, num_heads=3, qk_dim=6, v_dim=6, max_lag=4))
    both = nn.ModuleDict({"even": layer_of("relu"), "odd": three})
    with pytest.raises(ValueError, match=r"num_heads=3 of odd does not divide over 2 processes.*multiple of 2"):
        shard_heads(both)
    assert both["even"].config.num_heads == 2, "nothing is changed"
    with pytest.raises(ValueError, match="no attention layer"):
        shard_heads(nn.Linear(2, 2))
    layer = sharded("relu")
    with pytest.raises(ValueError, match="sharded already"):
        shard_heads(layer)
    with pytest.raises(RuntimeError, match="before shard_heads"):
        layer.reset_parameters()
    with pytest.raises(TypeError, match="hidden_states must be a tensor"):
        layer("text")
    adapted = layer_of("relu")
    adapted.q_proj = nn.Sequential(adapted.q_proj)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"q_proj\.0\.weight"):
        shard_heads(adapted)
    with pytest.raises(ValueError, match="on the meta device"):
        shard_heads(layer_of("relu").to("meta"))


def check_ways_to_run() -> None:
    """Recomputed, compiled in one graph, copied, and in low precision."""
    layer = sharded("hyperglu")
    x, weight = normal(1, TOKENS, HIDDEN), normal(1, TOKENS, HIDDEN, seed=2)
    expected = evaluate_layer(layer, x, weight).named()
    ways: dict[str, Any] = {
        "recomputed": partial(checkpoint, layer, use_reentrant=False),
        "compiled": torch.compile(layer, fullgraph=True, backend="aot_eager"),
    }
    ways["copied"] = copy = deepcopy(layer)
    for name, run in ways.items():
        inputs = [normal(1, TOKENS, HIDDEN).requires_grad_(), *(copy if name == "copied" else layer).parameters()]
        gradients = torch.autograd.grad(run(inputs[0]), inputs, weight)
        assert_close(dict(zip(list(expected)[1:], gradients, strict=True)), dict(list(expected.items())[1:]), RTOL)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(x.float()).dtype == torch.bfloat16


def check_language_model() -> None:
    """Two training steps in float64 with clipped gradients, and the tokens it then writes."""

    def trained(shard: bool) -> LanguageModel:
        torch.manual_seed(3)
        attention = HyperConfig(hidden_size=16, num_heads=4, qk_dim=16, mix_rank=2, max_lag=7)
        model = randomised(LanguageModel(LanguageModelConfig(40, 16, 2, attention)).double())
        if shard:
            shard_heads(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(2):
            optimizer.zero_grad()
            model.loss(ids[:, :-1], ids[:, 1:]).backward()
            norms.append(clip_grad_norm_(model, 0.5) if shard else nn.utils.clip_grad_norm_(model.parameters(), 0.5))
            optimizer.step()
        return model

    ids = torch.randint(40, (2, 11), generator=torch.Generator().manual_seed(4))
    norms: list[Tensor] = []
    model, whole = trained(True), trained(False)
    assert min(norms) > 0.5, "gradients are clipped"
    assert_close({"norms": torch.stack(norms[:2])}, {"norms": torch.stack(norms[2:])}, RTOL)
    assert_close(full_state_dict(model), whole.state_dict(), RTOL)
    written, expected = (generate(m, ids[:, :5], 12, temperature=0.0) for m in (model, whole))
    assert torch.equal(written, expected)
    assert len(set(written[0].tolist())) > 4, "a text of one token shows little"


CHECKS: dict[str, Callable[[], None]] = {
    **{f"{name}, {kind}": partial(check_gradients, name, kind)
       for name in LAYERS for kind in INPUTS if (name, kind) != ("bidirectional", "packed")},
    **{f"cache of {name}{', static' if static else ''}": partial(check_cache, name, static)
       for name in ("hyperglu", "hypermlp", "softmax with convolutions") for static in (False, True)},
    "unsummed convolutions": check_unsummed_convolutions_are_seen,
    "second gradients": check_second_gradients,
    "state dict": check_state_is_put_together,
    "first process": check_first_process_decides,
    "groups": check_groups,
    "errors": check_errors,
    "ways to run": check_ways_to_run,
    "language model": check_language_model,
}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return run_checks(CHECKS, tmp_path_factory.mktemp("heads"))


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes_equal_one(name: str, found: dict[str, list[str]]) -> None:
    assert not found[name], "\n".join(found[name])


def test_without_a_process_group() -> None:
    with pytest.raises(ValueError, match="init_process_group"):
        shard_heads(layer_of("relu"))
