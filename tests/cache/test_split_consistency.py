"""Any split of a sequence into prefill and steps gives the one-shot outputs."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hypermlp import HyperCache, HyperConfig, build_layer
from hypermlp.layers import AttentionLayer

WIDTH = 12


def make_layer(mixer: str = "hyperglu", dtype: torch.dtype = torch.float64, **options: object) -> AttentionLayer:
    config = HyperConfig(WIDTH, 2, mixer, **({"qk_dim": 8, "mix_rank": 3, "max_lag": 9} | options))
    layer = build_layer(config, layer_idx=0, dtype=dtype)
    for parameter in layer.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return layer


def run_split(
    layer: AttentionLayer, x: torch.Tensor, sizes: list[int], mask: torch.Tensor | None, cache: HyperCache
) -> torch.Tensor:
    outputs, start = [], 0
    with torch.no_grad():
        for size in sizes:
            new = slice(start, start + size)
            outputs.append(layer(x[:, new], None if mask is None else mask[:, new], cache=cache))
            start += size
    return torch.cat(outputs, dim=1)


@st.composite
def splits(draw: st.DrawFn) -> list[int]:
    return draw(st.lists(st.sampled_from([1, 1, 1, 2, 3, 8, 9, 10, 17]), min_size=1, max_size=7))


def padding(kind: str, batch: int, length: int) -> torch.Tensor | None:
    mask = torch.ones(batch, length, dtype=torch.long)
    if kind == "none":
        return None
    if kind == "left":
        for row in range(batch):
            mask[row, : min(3 * row, length - 1)] = 0
    if kind == "inside":
        mask = (torch.rand(batch, length) > 0.3).long()
    if kind == "empty row":
        mask[0] = 0
    return mask


@settings(max_examples=40, deadline=None)
@given(
    mixer=st.sampled_from(["hyperglu", "hypermlp", "relu", "softmax"]),
    sizes=splits(),
    kind=st.sampled_from(["none", "left", "inside", "empty row"]),
    rope=st.booleans(),
    conv_size=st.sampled_from([0, 1, 4]),
    max_crop=st.sampled_from([0, 64]),
    window=st.sampled_from([1, 5, 9, 200]),
)
def test_any_split_equals_one_shot(
    mixer: str, sizes: list[int], kind: str, rope: bool, conv_size: int, max_crop: int, window: int
) -> None:
    layer = make_layer(mixer, rope=rope, conv_size=conv_size, max_lag=window)
    x = torch.randn(3, sum(sizes), WIDTH, dtype=torch.float64)
    mask = padding(kind, 3, sum(sizes))
    with torch.no_grad():
        expected = layer(x, mask)
    actual = run_split(layer, x, sizes, mask, HyperCache(max_crop=max_crop))
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)


@settings(max_examples=10, deadline=None)
@given(sizes=splits(), kind=st.sampled_from(["none", "left", "inside"]))
def test_any_split_in_the_position_layout(sizes: list[int], kind: str) -> None:
    layer = make_layer(layout="position", max_lag=128)
    x = torch.randn(3, sum(sizes), WIDTH, dtype=torch.float64)
    mask = padding(kind, 3, sum(sizes))
    with torch.no_grad():
        expected = layer(x, mask)
    torch.testing.assert_close(run_split(layer, x, sizes, mask, HyperCache()), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("prompt", [1, 4, 9, 20])
@pytest.mark.parametrize("mixer", ["hyperglu", "softmax"])
def test_static_steps_equal_one_shot(mixer: str, prompt: int) -> None:
    layer = make_layer(mixer, rope=True)
    x = torch.randn(3, 30, WIDTH, dtype=torch.float64)
    mask = padding("left", 3, 30)
    with torch.no_grad():
        expected = layer(x, mask)
    cache = HyperCache(static=True, max_length=32)
    actual = run_split(layer, x, [prompt] + [1] * (30 - prompt), mask, cache)
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("max_lag", [9, 64])
def test_steps_in_low_precision_err_as_much_as_the_one_shot_run(dtype: torch.dtype, max_lag: int) -> None:
    exact = make_layer(max_lag=max_lag)
    low = make_layer(dtype=dtype, max_lag=max_lag)
    low.load_state_dict(exact.state_dict())
    exact.load_state_dict(low.state_dict())
    x = torch.randn(8, 40, WIDTH).to(dtype)
    with torch.no_grad():
        truth, one_shot = exact(x.double()), low(x).double()
    stepped = run_split(low, x, [5] + [1] * 35, None, HyperCache()).double()
    # on average over so many numbers the two are within a tenth of each other, whatever the order of the sums
    assert (stepped - truth).abs().mean() <= 1.5 * (one_shot - truth).abs().mean()


def test_a_cache_that_forgets_its_convolution_inputs_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer()
    x = torch.randn(1, 12, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        expected = layer(x)
    nothing = torch.zeros(1, 3, WIDTH, dtype=x.dtype)
    forgetful = {
        "inputs": ([4, 4, 4], lambda self, x: nothing),
        "window": ([4] + [1] * 8, lambda self, x: torch.cat((nothing, x[:, None]), dim=1)),
    }
    for method, (sizes, forgets) in forgetful.items():
        with monkeypatch.context() as patch:
            patch.setattr(f"hypermlp.cache.layer.LayerCache.{method}", forgets)
            assert (run_split(layer, x, sizes, None, HyperCache()) - expected).abs().max() > 1e-3, method


def test_packed_prompts_become_rows() -> None:
    layer = make_layer()
    lengths = [3, 1, 7]
    prompts = torch.randn(1, sum(lengths), WIDTH, dtype=torch.float64)
    bounds = torch.tensor([0, 3, 4, 11])
    following = torch.randn(3, 4, WIDTH, dtype=torch.float64)
    cache = HyperCache()
    with torch.no_grad():
        layer(prompts, cu_seqlens=bounds, cache=cache)
        steps = torch.cat([layer(following[:, i : i + 1], cache=cache) for i in range(4)], dim=1)
        for row, (start, stop) in enumerate(pairwise(bounds)):
            alone = layer(torch.cat((prompts[:, start:stop], following[row : row + 1]), dim=1))
            torch.testing.assert_close(steps[row : row + 1], alone[:, -4:], atol=1e-10, rtol=0)
    assert cache.lengths is not None
    assert cache.lengths.tolist() == [7, 5, 11]
