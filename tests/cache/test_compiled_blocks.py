"""Blocks that are compiled one by one share one graph, whichever place in the model each has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from hypermlp import HyperCache, HyperConfig, build_layer
from hypermlp.cache import CacheSpec
from hypermlp.layers.block import TransformerBlock
from hypermlp.models import LanguageModel, LanguageModelConfig
from tests.helpers import assert_close

DEPTH = 12  # more than the recompile limit, 8
CONFIG = HyperConfig(12, 2, max_lag=9, qk_dim=8)


@pytest.fixture(autouse=True)
def _forget_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def stack(kind: str) -> list[Any]:
    torch.manual_seed(0)
    options: dict[str, Any] = {"dtype": torch.float64}
    if kind == "layers":
        return [build_layer(CONFIG, layer_idx=i, **options).requires_grad_(False) for i in range(DEPTH)]
    return [TransformerBlock(CONFIG, 16, layer_idx=i, **options).requires_grad_(False) for i in range(DEPTH)]


@pytest.mark.parametrize("kind", ["layers", "blocks"])
@pytest.mark.parametrize("how", ["compile method", "torch.compile"])
def test_all_share_one_graph(kind: str, how: str) -> None:
    blocks = stack(kind)
    parts = {block: block if kind == "layers" else block.attention for block in blocks}
    x, cache = torch.randn(2, 11, 12, dtype=torch.float64), HyperCache(static=True, max_length=16)

    def run(new: Tensor, cache: HyperCache | None) -> Tensor:
        for block in blocks:
            new = new + block(new, cache=cache)
        return new

    expected = run(x, None)
    run(x[:, :5], cache)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = {}
    for block in blocks:
        if how == "compile method":
            block.compile(backend=counter, fullgraph=True)
        else:
            compiled[block] = torch.compile(block, backend=counter, fullgraph=True)
    for i in range(5, 11):
        new = x[:, i : i + 1].contiguous()
        for block in blocks:
            # a compiled wrapper sees its arguments from inside the graph: it is given the layer's part itself
            held = parts[block].cache_part(cache) if compiled else cache
            new = new + compiled.get(block, block)(new, cache=held)
        assert_close({"step": new}, {"step": expected[:, i : i + 1]}, rtol=1e-12)
    assert counter.frame_count == 1


def test_blocks_of_a_model_share_one_graph() -> None:
    torch.manual_seed(0)
    model = LanguageModel(LanguageModelConfig(20, 12, DEPTH, CONFIG), dtype=torch.float64).requires_grad_(False)
    ids, cache = torch.randint(20, (2, 8)), HyperCache(static=True, max_length=16)
    expected = model(ids)
    model(ids[:, :5], cache=cache)
    counter = CompileCounterWithBackend("aot_eager")
    for block in model.blocks:
        block.compile(backend=counter, fullgraph=True)
    steps = torch.cat([model(ids[:, i : i + 1], cache=cache) for i in range(5, 8)], dim=1)
    assert_close({"steps": steps}, {"steps": expected[:, 5:]}, rtol=1e-12)
    assert counter.frame_count == 1


def test_another_layers_part_is_refused() -> None:
    layer, other = (build_layer(HyperConfig(12, 2, max_lag=9, qk_dim=qk), layer_idx=0) for qk in (8, 16))
    with pytest.raises(ValueError, match="another layer's part"), torch.no_grad():
        layer(torch.randn(1, 3, 12), cache=other.cache_part(HyperCache()))


def addresses(cache: HyperCache) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in cache.layers[0].tensors().items()}


@pytest.mark.parametrize("static", [False, True])
def test_a_cache_filled_under_inference_mode_goes_on_without_it(static: bool) -> None:
    layer = build_layer(CONFIG, layer_idx=0, dtype=torch.float64)
    x, cache = torch.randn(2, 9, 12, dtype=torch.float64), HyperCache(static=static, max_length=16)
    with torch.inference_mode():
        layer(x[:, :5], cache=cache)
        layer(x[:, 5:6], cache=cache)
        saved = cache.state_dict()
    before = addresses(cache) if static else {}
    step = torch.compile(lambda new: layer(new, cache=cache), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected = layer(x)
        parts = [layer(x[:, 6:7], cache=cache), step(x[:, 7:8]), step(x[:, 8:])]
        assert_close({"steps": torch.cat(parts, dim=1)}, {"steps": expected[:, 6:]}, rtol=1e-12)
        assert before == (addresses(cache) if static else {})
        cache.load_state_dict(saved, {0: CacheSpec.of(CONFIG)})
        parts = [layer(x[:, i : i + 1], cache=cache) for i in range(6, 9)]
        assert_close({"steps": torch.cat(parts, dim=1)}, {"steps": expected[:, 6:]}, rtol=1e-12)
