"""What a cache can be asked to do: crop, reorder, repeat, save; its bounds and its errors."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch

from hypermlp import HyperCache, HyperConfig, build_layer
from hypermlp.cache import CacheSpec
from hypermlp.layers import AttentionLayer

WIDTH = 12


@pytest.fixture
def layer() -> AttentionLayer:
    layer = build_layer(HyperConfig(WIDTH, 2, qk_dim=8, mix_rank=3, max_lag=9), layer_idx=0, dtype=torch.float64)
    for parameter in layer.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return layer.requires_grad_(False)


def tokens(length: int, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, length, WIDTH, dtype=torch.float64)


@pytest.mark.parametrize("length", [5, 9, 30])
@pytest.mark.parametrize("dropped", [1, 4])
def test_crop_then_continue_equals_never_having_gone_on(layer: AttentionLayer, length: int, dropped: int) -> None:
    x, detour = tokens(length), tokens(dropped)
    following = tokens(5)
    straight, cropped = HyperCache(max_crop=4), HyperCache(max_crop=4)
    layer(x, cache=straight)
    layer(x, cache=cropped)
    layer(detour, cache=cropped)
    cropped.crop(-dropped)
    for step in range(5):
        new = following[:, step : step + 1]
        torch.testing.assert_close(layer(new, cache=cropped), layer(new, cache=straight), atol=1e-12, rtol=0)


@pytest.mark.parametrize("window", [9, 64])
@pytest.mark.parametrize("between", [0, 2])
def test_crops_add_up(window: int, between: int) -> None:
    layer = build_layer(HyperConfig(WIDTH, 2, max_lag=window, qk_dim=8), layer_idx=0, dtype=torch.float64)
    layer.requires_grad_(False)
    x, detour, new = tokens(90), tokens(between), tokens(1)
    cache = HyperCache(max_crop=6)
    layer(x, cache=cache)
    cache.crop(-3)
    for step in range(between):
        layer(detour[:, step : step + 1], cache=cache)
    with pytest.raises(ValueError, match=f"only the last {3 + between} can be"):
        cache.crop(-4 - between)
    cache.crop(-3 - between)
    expected = layer(torch.cat((x[:, :84], new), dim=1))[:, -1:]
    torch.testing.assert_close(layer(new, cache=cache), expected, atol=1e-12, rtol=0)


def test_crop_by_row_after_the_window_has_wrapped_twice(layer: AttentionLayer) -> None:
    x, following = tokens(30, batch=2), tokens(12, batch=2)
    cache = HyperCache(max_crop=8)
    layer(x, cache=cache)
    cache.crop(torch.tensor([25, 28]))
    for step in range(12):
        layer(following[:, step : step + 1], cache=cache)
    cache.crop(torch.tensor([35, 40]))
    new = tokens(1, batch=2)
    steps = layer(new, cache=cache)
    for row, (kept, added) in enumerate([(25, 10), (28, 12)]):
        parts = (x[row : row + 1, :kept], following[row : row + 1, :added], new[row : row + 1])
        torch.testing.assert_close(steps[row : row + 1], layer(torch.cat(parts, dim=1))[:, -1:], atol=1e-12, rtol=0)


@pytest.mark.parametrize("length", [6, 100])
def test_crop_to_nothing_starts_again(layer: AttentionLayer, length: int) -> None:
    cache = HyperCache(max_crop=4)
    layer(tokens(length), torch.arange(length).expand(3, length) > 2, cache=cache)
    cache.crop(0)
    x = tokens(12)
    again = torch.cat([layer(part, cache=cache) for part in x.split([3, 1, 8], dim=1)], dim=1)
    torch.testing.assert_close(again, layer(x), atol=1e-12, rtol=0)


def test_a_saved_ring_goes_on_in_a_cache_of_other_options(layer: AttentionLayer) -> None:
    x, following = tokens(30), tokens(20)
    for saved, loaded in ((4, 0), (0, 4), (0, 200)):
        cache, again = HyperCache(max_crop=saved), HyperCache(max_crop=loaded)
        layer(x, cache=cache)
        again.load_state_dict(cache.state_dict(), {0: CacheSpec.of(layer.config)})
        steps = torch.cat([layer(token, cache=again) for token in following.split(1, dim=1)], dim=1)
        torch.testing.assert_close(steps, layer(torch.cat((x, following), dim=1))[:, 30:], atol=1e-12, rtol=0)


def test_a_cache_filled_in_inference_mode_goes_on_outside(layer: AttentionLayer) -> None:
    x, cache = tokens(14), HyperCache()
    with torch.inference_mode():
        layer(x[:, :12], cache=cache)
    last = torch.cat([layer(token, cache=cache) for token in x[:, 12:].split(1, dim=1)], dim=1)
    torch.testing.assert_close(last, layer(x)[:, 12:], atol=1e-12, rtol=0)


@pytest.mark.parametrize("window", [9, 64])
def test_crop_by_row_continues_prompts_padded_on_the_right(window: int) -> None:
    layer = build_layer(HyperConfig(WIDTH, 2, max_lag=window, qk_dim=8), layer_idx=0, dtype=torch.float64)
    layer.requires_grad_(False)
    lengths = torch.tensor([7, 2, 5])
    prompts, following = tokens(7), tokens(4)
    mask = torch.arange(7) < lengths[:, None]
    cache = HyperCache()
    layer(prompts, mask, cache=cache)
    cache.crop(lengths)
    assert cache.lengths is not None
    assert cache.lengths.tolist() == lengths.tolist()
    steps = torch.cat([layer(following[:, i : i + 1], cache=cache) for i in range(4)], dim=1)
    for row, length in enumerate(lengths):
        alone = layer(torch.cat((prompts[row : row + 1, :length], following[row : row + 1]), dim=1))
        torch.testing.assert_close(steps[row : row + 1], alone[:, -4:], atol=1e-12, rtol=0)


def test_beam_reordering_equals_recomputation(layer: AttentionLayer) -> None:
    x, following, beams = tokens(11), tokens(1), torch.tensor([2, 0, 2])
    cache = HyperCache()
    layer(x, cache=cache)
    cache.reorder(beams)
    expected = layer(torch.cat((x[beams], following), dim=1))[:, -1:]
    torch.testing.assert_close(layer(following, cache=cache), expected, atol=1e-12, rtol=0)


def test_repeat_and_select_change_the_batch(layer: AttentionLayer) -> None:
    x = tokens(4, batch=2)
    cache = HyperCache()
    layer(x, torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), cache=cache)
    cache.repeat(2)
    assert cache.lengths is not None
    assert cache.lengths.tolist() == [3, 3, 4, 4]
    cache.select(torch.tensor([3]))
    assert cache.lengths.tolist() == [4]
    following = tokens(1, batch=1)
    expected = layer(torch.cat((x[1:], following), dim=1))[:, -1:]
    torch.testing.assert_close(layer(following, cache=cache), expected, atol=1e-12, rtol=0)


def test_memory_stops_growing_at_the_window(layer: AttentionLayer) -> None:
    cache = HyperCache(max_crop=2)
    layer(tokens(12), cache=cache)
    held = cache.nbytes
    per_token = layer.config.qk_dim + layer.config.v_dim
    slots, hidden = 9 + 2, (3 + 2) * WIDTH
    assert held == 3 * 8 * (slots * per_token + hidden)
    for _ in range(30):
        layer(tokens(1), cache=cache)
    assert cache.nbytes == held
    assert cache.get_seq_length() == 42


def test_state_dict_round_trip(layer: AttentionLayer) -> None:
    cache, following = HyperCache(), tokens(1)
    layer(tokens(14), torch.arange(14).expand(3, 14) >= torch.tensor([[0], [2], [5]]), cache=cache)
    again = HyperCache()
    again.load_state_dict(cache.state_dict(), {0: CacheSpec.of(layer.config)})
    torch.testing.assert_close(layer(following, cache=again), layer(following, cache=copy.deepcopy(cache)))
    assert again.lengths is not None
    assert again.lengths.tolist() == [15, 13, 10]


def test_reset_forgets(layer: AttentionLayer) -> None:
    cache, x = HyperCache(), tokens(6)
    layer(tokens(8), torch.arange(8).expand(3, 8) > 2, cache=cache)
    cache.reset()
    torch.testing.assert_close(layer(x, cache=cache), layer(x))


def test_reset_takes_another_batch(layer: AttentionLayer) -> None:
    cache, x = HyperCache(), tokens(6, batch=2)
    layer(tokens(8, batch=3), cache=cache)
    cache.reset()
    torch.testing.assert_close(layer(x, cache=cache), layer(x))


def test_to_changes_the_dtype(layer: AttentionLayer) -> None:
    cache = HyperCache()
    layer(tokens(6), cache=cache)
    held = cache.nbytes
    assert cache.to(dtype=torch.float32).nbytes == held // 2
    layer.to(torch.float32)(tokens(1).float(), cache=cache)


def test_many_layers_share_one_cache() -> None:
    config = HyperConfig(WIDTH, 2, max_lag=9, qk_dim=8)
    layers = [build_layer(config, layer_idx=i, dtype=torch.float64).requires_grad_(False) for i in (0, 1)]
    x, cache = tokens(12, batch=1), HyperCache()
    expected = layers[1](layers[0](x))
    first = layers[1](layers[0](x[:, :9], cache=cache), cache=cache)
    last = torch.cat([layers[1](layers[0](x[:, i : i + 1], cache=cache), cache=cache) for i in (9, 10, 11)], dim=1)
    torch.testing.assert_close(torch.cat((first, last), dim=1), expected, atol=1e-12, rtol=0)


class TestErrors:
    """Each says what is wrong and changes nothing."""

    @staticmethod
    def refused(layer: AttentionLayer, cache: HyperCache, x: torch.Tensor, match: str) -> None:
        before = {name: tensor.clone() for name, tensor in cache.state_dict().items()}
        with pytest.raises((ValueError, TypeError, RuntimeError), match=match):
            layer(x, cache=cache)
        after = cache.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)

    def filled(self, layer: AttentionLayer, **options: int) -> HyperCache:
        cache = HyperCache(**options)
        layer(tokens(6), cache=cache)
        return cache

    def test_past_its_capacity(self, layer: AttentionLayer) -> None:
        cache = self.filled(layer, max_length=7)
        layer(tokens(1), cache=cache)
        self.refused(layer, cache, tokens(1), "max_length")

    def test_another_batch(self, layer: AttentionLayer) -> None:
        self.refused(layer, self.filled(layer), tokens(1, batch=2), "batch 3 and got 2")

    def test_another_dtype(self, layer: AttentionLayer) -> None:
        cache = self.filled(layer)
        self.refused(layer.to(torch.float32), cache, tokens(1).float(), "float64 and got torch.float32")

    def test_another_device(self, layer: AttentionLayer) -> None:
        cache = self.filled(layer)
        self.refused(layer.to("meta"), cache, tokens(1).to("meta"), "cpu and got meta")

    def test_another_layer(self, layer: AttentionLayer) -> None:
        other = build_layer(HyperConfig(WIDTH, 1, max_lag=9), layer_idx=0, dtype=torch.float64)
        self.refused(other.requires_grad_(False), self.filled(layer), tokens(1), "another layer")

    def test_gradients(self, layer: AttentionLayer) -> None:
        cache = self.filled(layer.requires_grad_(False))
        self.refused(layer.requires_grad_(True), cache, tokens(1), "no_grad")

    def test_positions_past_the_tables(self) -> None:
        layer = build_layer(HyperConfig(WIDTH, 2, layout="position", max_lag=7), layer_idx=0, dtype=torch.float64)
        cache = self.filled(layer.requires_grad_(False))
        self.refused(layer, cache, tokens(2), "more pass its 7")

    def test_a_mask_of_another_length(self, layer: AttentionLayer) -> None:
        with pytest.raises(ValueError, match="1 new tokens or all 7, got 5"):
            layer(tokens(1), torch.ones(3, 5, dtype=torch.long), cache=self.filled(layer))

    def test_no_layer_idx(self) -> None:
        layer = build_layer(HyperConfig(WIDTH)).requires_grad_(False)
        with pytest.raises(ValueError, match="layer_idx"):
            layer(torch.randn(1, 2, WIDTH), cache=HyperCache())

    def test_bidirectional(self) -> None:
        layer = build_layer(HyperConfig(WIDTH, causal=False), layer_idx=0).requires_grad_(False)
        with pytest.raises(ValueError, match="causal=False"):
            layer(torch.randn(1, 2, WIDTH), cache=HyperCache())

    def test_crop_past_what_is_kept(self, layer: AttentionLayer) -> None:
        cache = HyperCache(max_crop=2)
        layer(tokens(20), cache=cache)
        with pytest.raises(ValueError, match="max_crop"):
            cache.crop(17)
        with pytest.raises(ValueError, match="keep 0 to 20"):
            cache.crop(21)

    def test_a_static_cache_takes_single_tokens(self, layer: AttentionLayer) -> None:
        cache = HyperCache(static=True, max_length=20)
        layer(tokens(6), cache=cache)
        self.refused(layer, cache, tokens(2), "one token at a time")
        with pytest.raises(ValueError, match="max_length"):
            HyperCache(static=True)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_goes_on_by_blocks_and_steps(layer: AttentionLayer, copied: Callable[[HyperCache], HyperCache]) -> None:
    x, cache = tokens(20), HyperCache()
    layer(x[:, :5], cache=cache)
    twin = copied(cache)
    layer(tokens(3), cache=cache)
    parts = [layer(part, cache=twin) for part in x[:, 5:].split([1, 4, 1, 6, 3], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), layer(x)[:, 5:], atol=1e-12, rtol=0)
