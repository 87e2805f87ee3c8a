"""What a cache takes from its callers: lengths, dtypes and saved states; and what it refuses, unchanged."""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from hypermlp import HyperCache, HyperConfig, HyperGLU, build_layer
from hypermlp.cache import CacheSpec
from hypermlp.layers import AttentionLayer

WIDTH = 12


def make(window: int | None = 9, layer_idx: int = 0, **options: object) -> AttentionLayer:
    settings = {"num_heads": 2, "qk_dim": 8, "max_lag": window, **options}
    layer = build_layer(HyperConfig(WIDTH, **settings), layer_idx=layer_idx, dtype=torch.float64)
    for parameter in layer.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return layer.requires_grad_(False)


def tokens(length: int, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, length, WIDTH, dtype=torch.float64)


def filled(layer: AttentionLayer, length: int = 5, **options: object) -> HyperCache:
    cache = HyperCache(**options)
    layer(tokens(length), cache=cache)
    return cache


def unchanged(cache: HyperCache, change: Callable[[], object], error: type[Exception], match: str) -> None:
    before = cache.state_dict()
    with pytest.raises(error, match=match):
        change()
    after = cache.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("wrong", [2.5, 2.0, True, False, "2", None, torch.tensor([2.0, 2.0, 2.0]), torch.tensor(2)])
def test_crop_takes_integers_alone(wrong: object) -> None:
    cache = filled(make())
    unchanged(cache, lambda: cache.crop(wrong), TypeError, "lengths must be an int")
    with pytest.raises(TypeError, match="lengths"):
        HyperCache().crop(wrong)


def test_crop_takes_numpy_integers() -> None:
    numpy = pytest.importorskip("numpy", reason="its integers are what is tried: an extra")
    cache = filled(make())
    cache.crop(numpy.int64(-2))
    assert cache.get_seq_length() == 3


def test_other_arguments_of_a_wrong_type() -> None:
    cache = filled(make())
    unchanged(cache, lambda: cache.repeat(2.5), TypeError, "times")
    unchanged(cache, lambda: cache.repeat(True), TypeError, "times")
    unchanged(cache, lambda: cache.repeat(0), ValueError, "times")
    unchanged(cache, lambda: cache.select(torch.tensor([True, False, True])), TypeError, "indices")
    unchanged(cache, lambda: cache.select(torch.tensor([0.0])), TypeError, "indices")
    unchanged(cache, lambda: cache.reorder([0, 1, 2]), TypeError, "indices")
    for options in ({"max_crop": 2.5}, {"max_crop": True}, {"max_length": 8.0}, {"max_length": True}):
        with pytest.raises(TypeError, match=next(iter(options))):
            HyperCache(**options)


def test_crop_of_several_layers_happens_in_all_or_in_none() -> None:
    wide, narrow = make(None, mixer="softmax"), make(9, layer_idx=1)
    cache = HyperCache(max_crop=2)
    for layer in (wide, narrow):
        layer(tokens(20), cache=cache)
    unchanged(cache, lambda: cache.crop(10), ValueError, "only the last 2 can be")
    unchanged(cache, lambda: cache.crop(torch.tensor([20, 10, 20])), ValueError, "only the last 2 can be")


@pytest.mark.parametrize("how", ["position", "keyword"])
def test_to_casts_every_part(how: str) -> None:
    layer, x = make(), tokens(9)
    cache = HyperCache()
    layer(x[:, :6], torch.tensor([[0, 1, 1, 1, 1, 1]] * 3), cache=cache)
    assert (cache.to(torch.bfloat16) if how == "position" else cache.to(dtype=torch.bfloat16)) is cache
    parts = cache.state_dict()
    for name in ("keys", "values", "inputs"):
        assert parts[f"layers.0.{name}"].dtype == torch.bfloat16
    assert parts["layers.0.valid"].dtype == torch.bool
    assert parts["layers.0.start"].tolist() == [1, 1, 1]
    half = layer.to(torch.bfloat16)
    stepped = torch.cat([half(token, cache=cache) for token in x[:, 6:].bfloat16().split(1, dim=1)], dim=1)
    again = filled_as(half, x[:, :6].bfloat16())
    expected = torch.cat([half(token, cache=again) for token in x[:, 6:].bfloat16().split(1, dim=1)], dim=1)
    whole = half.double()(x, torch.tensor([[0] + [1] * 8] * 3))[:, 6:]
    # no further from the exact values than a cache that was bfloat16 from the start, give or take its own error; by the
    # mean, since the largest of a few hundred differences varies threefold from seed to seed
    assert (stepped.double() - whole).abs().mean() <= 2 * (expected.double() - whole).abs().mean()


def filled_as(layer: AttentionLayer, x: torch.Tensor) -> HyperCache:
    cache = HyperCache()
    layer(x, torch.tensor([[0] + [1] * (x.shape[1] - 1)] * len(x)), cache=cache)
    return cache


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
def test_to_refuses_dtypes_that_lose_values(dtype: torch.dtype) -> None:
    cache = filled(make())
    unchanged(cache, lambda: cache.to(dtype=dtype), TypeError, "floating-point")
    unchanged(cache, lambda: cache.to(dtype), TypeError, "floating-point")
    unchanged(cache, lambda: cache.to(torch.float32, torch.float64), TypeError, "one dtype")


@pytest.mark.parametrize(
    ("window", "mixer"), [(64, "hyperglu"), (9, "hyperglu"), (None, "softmax"), (64, "softmax"), (2, "hyperglu")]
)
@pytest.mark.parametrize("max_crop", [1, 3])
@pytest.mark.parametrize("by_row", [False, True])
def test_any_crop_before_the_window_is_full(window: int | None, mixer: str, max_crop: int, by_row: bool) -> None:
    """Also one that goes back further than the convolutions' own ring would reach."""
    layer = make(window, mixer=mixer, conv_size=4)
    room = 30 if window is None else min(30, window + max_crop)
    x, following = tokens(room), tokens(6)
    for kept in range(room):
        cache = HyperCache(max_crop=max_crop)
        for part in x.split([room // 2, room - room // 2], dim=1) if room > 1 else [x]:
            layer(part, cache=cache)
        cache.crop(torch.tensor([kept, kept, kept]) if by_row else kept)
        steps = torch.cat([layer(token, cache=cache) for token in following.split(1, dim=1)], dim=1)
        whole = layer(torch.cat((x[:, :kept], following), dim=1))[:, kept:]
        torch.testing.assert_close(steps, whole, atol=1e-11, rtol=0)


def test_a_cache_that_is_never_cropped_keeps_what_convolutions_read_alone() -> None:
    layer, cache, x = make(40), HyperCache(max_crop=0), tokens(30)
    layer(x, cache=cache)
    cropped = HyperCache(max_crop=1)
    layer(x, cache=cropped)
    per_token = layer.config.qk_dim + layer.config.v_dim
    assert cache.nbytes < cropped.nbytes
    assert cache.nbytes <= 3 * 8 * (40 * per_token + (3 + 1) * WIDTH)
    unchanged(cache, lambda: cache.crop(-2), ValueError, "larger max_crop")


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("again", ["reset", "loaded"])
def test_nor_does_it_after_a_reset_or_when_it_is_loaded(window: int | None, again: str) -> None:
    layer = make(window, mixer="softmax", conv_size=4)
    cache = filled(layer, 2, max_crop=0)
    if again == "reset":
        cache.reset()
    else:
        state, cache = cache.state_dict(), HyperCache(max_crop=0)
        cache.load_state_dict(state, {0: CacheSpec.of(layer.config)})
    for token in tokens(30).split(1, dim=1):
        layer(token, cache=cache)
    # three tokens for the next one's convolutions, and that one
    assert cache.state_dict()["layers.0.inputs"].shape == (3, 4, WIDTH)


@pytest.mark.parametrize("single", [False, True])
def test_hidden_states_go_when_the_window_is_full_and_come_back_with_a_reset(single: bool) -> None:
    layer, cache = make(20), HyperCache(max_crop=2)
    x = tokens(60)
    for turn in range(2):
        if turn:
            cache.reset()
        for part in x.split([1] * 60 if single else [15, 40, 5], dim=1):
            out = layer(part, cache=cache)
        torch.testing.assert_close(out[:, -1:], layer(x)[:, -1:], atol=1e-11, rtol=0)
        per_token = layer.config.qk_dim + layer.config.v_dim
        assert cache.nbytes == 3 * 8 * ((20 + 2) * per_token + (3 + 2) * WIDTH)
        cache.reset()
        layer(x[:, :18], cache=cache)
        cache.crop(1)
        torch.testing.assert_close(layer(x[:, 1:2], cache=cache), layer(x[:, :2])[:, 1:], atol=1e-11, rtol=0)


class TestState:
    """A state is what was remembered, no more; one that contradicts itself is refused."""

    @pytest.mark.parametrize("static", [False, True])
    @pytest.mark.parametrize("length", [1, 2, 5, 9, 30])
    @pytest.mark.parametrize("to_static", [False, True])
    def test_round_trip(self, static: bool, length: int, to_static: bool) -> None:
        layer, x, following = make(), tokens(length), tokens(12)
        mask = torch.arange(length).expand(3, length) >= torch.tensor([[0], [min(2, length - 1)], [0]])
        cache = HyperCache(static=static, max_length=60)
        layer(x, mask, cache=cache)
        state = cache.state_dict()
        again = HyperCache(static=to_static, max_length=50)
        again.load_state_dict(state, {0: CacheSpec.of(layer.config)})
        assert again.get_seq_length() == length
        assert torch.equal(again.lengths, cache.lengths)
        kept = {name: tensor.clone() for name, tensor in state.items()}
        for token in following.split(1, dim=1):
            torch.testing.assert_close(layer(token, cache=again), layer(token, cache=cache), atol=1e-12, rtol=0)
        assert all(torch.equal(state[name], kept[name]) for name in state)  # it was copied

    @pytest.mark.parametrize("static", [False, True])
    def test_it_holds_no_more_than_the_tokens(self, static: bool) -> None:
        state = filled(make(64), static=static, max_length=64).state_dict()
        assert state["layers.0.keys"].shape == (3, 4, 5, 2)
        assert state["layers.0.values"].shape == (3, 2, 5, 6)

    @pytest.mark.parametrize("static", [False, True])
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("length", torch.tensor(50)),
            ("length", torch.tensor(4)),
            ("length", torch.tensor(-1)),
            ("length", torch.tensor(5.0)),
            ("length", torch.tensor([5, 5, 5])),
            ("length", None),
            ("keys", torch.zeros(3, 4, 6, 2)),
            ("keys", torch.zeros(3, 2, 5, 4)),
            ("keys", torch.zeros(3, 4, 5, 2, dtype=torch.float32)),
            ("keys", torch.zeros(2, 4, 5, 2)),
            ("keys", torch.zeros(3, 4, 5, 2, dtype=torch.int64)),
            ("keys", torch.tensor(1.0)),
            ("keys.oldest", torch.tensor(1)),
            ("keys.oldest", torch.tensor(-1)),
            ("values", None),
            ("values", torch.zeros(3, 2, 4, 6)),
            ("inputs", None),
            ("inputs", torch.zeros(3, 5, 11)),
            ("valid", torch.ones(3, 5, 1)),
            ("valid", torch.ones(3, 4, 1, dtype=torch.bool)),
            ("start", torch.tensor([0, 0, 6])),
            ("start", torch.tensor([0, 0, -1])),
            ("start", torch.tensor([0, 0])),
            ("start", torch.tensor([0.0, 0.0, 0.0])),
            ("more", torch.tensor(1)),
        ],
    )
    def test_a_contradiction_is_refused(self, static: bool, name: str, value: torch.Tensor | None) -> None:
        layer, other = make(64), filled(make())
        cache = HyperCache(static=static, max_length=64)
        layer(tokens(5), torch.tensor([[0, 1, 1, 1, 1]] * 3), cache=cache)
        state = cache.state_dict()
        if value is None:
            del state[f"layers.0.{name}"]
        else:
            state[f"layers.0.{name}"] = value
        specs, match = {0: CacheSpec.of(layer.config)}, f"state_dict.*({name.partition('.')[0]}|keys|values)"
        for loaded in (other, HyperCache(static=static, max_length=64)):
            unchanged(loaded, partial(loaded.load_state_dict, state, specs), ValueError, match)

    def test_keys_that_are_no_names_of_a_cache(self) -> None:
        cache, spec = filled(make()), {0: CacheSpec.of(make().config)}
        for state in ({"keys": torch.zeros(1)}, {"layers.x.keys": torch.zeros(1)}, {"layers.0.length": 5}):
            unchanged(cache, partial(cache.load_state_dict, state, spec), ValueError, "layers.INDEX.NAME")

    def test_more_tokens_than_the_cache_takes(self) -> None:
        layer = make(64)
        state = filled(layer, 30).state_dict()
        for static in (False, True):
            cache = HyperCache(static=static, max_length=20)
            with pytest.raises(ValueError, match="holds 30 tokens and the cache takes 20"):
                cache.load_state_dict(state, {0: CacheSpec.of(layer.config)})

    def test_a_window_that_lacks_tokens(self) -> None:
        layer = make(9)
        state = filled(layer, 30, max_crop=0).state_dict()
        state["layers.0.values"] = state["layers.0.values"][:, :, 4:]
        state["layers.0.values.oldest"] += 4
        with pytest.raises(ValueError, match="begin with token 25: the next one reads 8 of 30"):
            HyperCache().load_state_dict(state, {0: CacheSpec.of(layer.config)})


@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_packed_rows_of_a_first_call_are_what_counts(static):
    layer = HyperGLU(16, layer_idx=0, max_lag=32, dtype=torch.float64)
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    cache = HyperCache(max_length=8, static=static)
    packed = layer(x, cu_seqlens=torch.tensor([0, 4, 8, 12]), cache=cache)
    rows = layer(x.view(3, 4, 16), cache=HyperCache(max_length=8))
    torch.testing.assert_close(packed.view(3, 4, 16), rows, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="9 more pass its 8"):
        layer(x, cu_seqlens=torch.tensor([0, 9, 12]), cache=HyperCache(max_length=8, static=static))


@torch.no_grad()
def test_a_first_call_of_empty_sequences_alone_takes_nothing_in():
    layer, x, cache = HyperGLU(16, layer_idx=0, max_lag=8), torch.randn(1, 3, 16), HyperCache()
    assert not layer(x, cu_seqlens=torch.tensor([2, 2]), cache=cache).any()
    assert cache.layers[0].empty
