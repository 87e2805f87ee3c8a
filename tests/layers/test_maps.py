"""The effective map of a layer: its output is the map times the values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hypermlp import HyperCache, HyperConfig, build_layer
from hypermlp.layers import AttentionLayer
from hypermlp.layers.maps import attention_map
from hypermlp.ops.varlen import Tokens
from tests.helpers import error

MIXERS = ["hyperglu", "hypermlp", "relu", "softmax"]


def make(mixer: str, **options: Any) -> AttentionLayer:
    layer = build_layer(
        HyperConfig(16, mixer=mixer, **({"max_lag": 12, "conv_size": 3} | options)), layer_idx=0, dtype=torch.float64
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return layer


def read_by_map(layer: AttentionLayer, x: Tensor, weights: Tensor, **kwargs: Any) -> Tensor:
    """The layer's output from its map, by its own projections."""
    _, v = layer.keys_values(x, Tokens(None, kwargs.get("cu_seqlens")))
    return layer.output(torch.einsum("bhts,bshv->bthv", weights, v).flatten(-2), layer.gates(x))


@pytest.mark.parametrize("mixer", MIXERS)
def test_output_is_map_times_values(mixer: str) -> None:
    layer, x = make(mixer), torch.randn(2, 9, 16, dtype=torch.float64)
    weights = attention_map(layer, x)
    assert weights.shape == (2, 2, 9, 9)
    assert error(read_by_map(layer, x, weights), layer(x)) < 1e-12
    assert not weights.triu(1).any()


def test_bidirectional_and_packed() -> None:
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    both = make("hyperglu", causal=False)
    assert attention_map(both, x).triu(1).any()
    assert error(read_by_map(both, x, attention_map(both, x)), both(x)) < 1e-12
    layer, bounds = make("hyperglu"), torch.tensor([0, 4, 9])
    weights = attention_map(layer, x, cu_seqlens=bounds)
    assert not weights[..., 4:, :4].any()
    assert error(read_by_map(layer, x, weights, cu_seqlens=bounds), layer(x, cu_seqlens=bounds)) < 1e-12


@pytest.mark.parametrize("mixer", MIXERS)
def test_padded_tokens_read_nothing_and_are_not_read(mixer: str) -> None:
    layer, x = make(mixer), torch.randn(2, 9, 16, dtype=torch.float64)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :3] = False
    weights = attention_map(layer, x, mask)
    assert error(weights[1:, :, 3:, 3:], attention_map(layer, x[1:, 3:])) < 1e-12
    assert not weights[1, :, 3:, :3].any()


@pytest.mark.parametrize("backend", ["reference", "chunked", "auto"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_token_masked_inside_is_read_by_none(mixer: str, backend: str) -> None:
    """What its value is has no part in the output, so the map has a zero there, on every path and after a cache."""
    layer, x = make(mixer), torch.randn(1, 9, 16, dtype=torch.float64)
    layer.backend = backend  # type: ignore[assignment]
    mask = torch.ones(1, 9, dtype=torch.bool)
    mask[0, 4] = mask[0, 6] = False
    weights = attention_map(layer, x, mask)
    assert not weights[0, :, mask[0]][..., ~mask[0]].any()
    assert weights[0, :, 8, 5].any()
    cache = HyperCache()
    with torch.no_grad():
        layer(x[:, :5], mask[:, :5], cache=cache)
        rows = attention_map(layer, x[:, 5:], mask[:, 5:], cache=cache)
    assert error(rows[:, :, mask[0, 5:]], weights[:, :, 5:][:, :, mask[0, 5:]]) < 1e-12


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mixer", MIXERS)
def test_rows_after_a_cache_are_rows_of_the_whole(mixer: str, masked: bool, rope: bool) -> None:
    layer, x = make(mixer, rope=rope, qk_dim=16), torch.randn(2, 19, 16, dtype=torch.float64)
    mask = torch.ones(2, 19, dtype=torch.bool)
    if masked:
        mask[1, :3] = False
    whole = attention_map(layer, x, mask)
    cache = HyperCache()
    with torch.no_grad():
        for start, stop in ((0, 7), (7, 8), (8, 9), (9, 15), (15, 18), (18, 19)):
            rows = attention_map(layer, x[:, start:stop], mask[:, start:stop], cache=cache)
            assert error(rows, whole[:, :, start:stop, :stop]) < 1e-12
            layer(x[:, start:stop], mask[:, start:stop], cache=cache)
            assert cache.get_seq_length() == stop, "the map must not take tokens in"


def test_a_wrong_map_is_noticed() -> None:
    layer, x = make("hyperglu"), torch.randn(2, 9, 16, dtype=torch.float64)
    assert error(read_by_map(layer, x, attention_map(layer, x.flip(1))), layer(x)) > 1e-3


def test_a_static_cache_with_tokens_is_refused() -> None:
    layer, x = make("hyperglu"), torch.randn(1, 4, 16, dtype=torch.float64)
    cache = HyperCache(static=True, max_length=8)
    with torch.no_grad():
        layer(x, cache=cache)
        with pytest.raises(ValueError, match="growing cache"):
            attention_map(layer, x[:, :1], cache=cache)
