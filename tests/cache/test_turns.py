"""One cache, one step: every layer takes in the same tokens once, and whatever else comes is an error."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from torch import Tensor, nn

from hypermlp import HyperCache, HyperConfig, HyperGLU
from hypermlp.cache import CacheSpec
from hypermlp.models import LanguageModel, LanguageModelConfig

KINDS = {"growing": {}, "static": {"static": True, "max_length": 40}}


def layer(index: int) -> HyperGLU:
    return HyperGLU(8, max_lag=16, layer_idx=index, dtype=torch.float64).requires_grad_(False)


class Stack(nn.Module):
    """Layers in the order in which they are called: one may come several times."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, cache: HyperCache | None = None) -> Tensor:
        for part in self.layers:
            x = x + part(x, cache=cache)
        return x


def in_steps(model: nn.Module, cache: HyperCache, parts: list[int]) -> Tensor:
    x = torch.randn(2, sum(parts), 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = torch.cat([model(part, cache=cache) for part in x.split(parts, dim=1)], dim=1)
    torch.testing.assert_close(found, model(x))
    return found


@pytest.fixture(params=KINDS)
def cache(request: pytest.FixtureRequest) -> HyperCache:
    return HyperCache(**KINDS[request.param])


@pytest.mark.parametrize("order", [(0,), (0, 1, 2), (5, 3), (2, 0, 1)])
def test_layers_in_any_order_take_their_turns(order: tuple[int, ...], cache: HyperCache) -> None:
    in_steps(Stack(*(layer(index) for index in order)), cache, [7, 1, 1, 1])
    cache.reset()
    in_steps(Stack(*(layer(index) for index in order)), cache, [5, 1, 1])


def test_blocks_crops_and_reloading_keep_the_turns() -> None:
    model, cache = Stack(layer(3), layer(1)), HyperCache()
    x = torch.randn(2, 16, 8, dtype=torch.float64)
    model(x[:, :9], cache=cache)
    model(x[:, 9:14], cache=cache)
    cache.crop(8)
    model(x[:, 8:12], cache=cache)
    again = HyperCache()
    state = cache.state_dict()
    again.load_state_dict(
        {name: state[name] for name in sorted(state)}, {m.layer_idx: m.cache_spec for m in model.layers}
    )
    for going_on in (cache, again):
        out = torch.cat([model(x[:, i : i + 1], cache=going_on) for i in range(12, 16)], dim=1)
        torch.testing.assert_close(out, model(x)[:, 12:])


@pytest.mark.parametrize("places", [(0, 0, 1), (0, 1, 1), (0, 1, 0), (0, 0, 0, 1), (0, 1, 1, 2)])
def test_a_layer_called_more_often_than_others(places: tuple[int, ...], cache: HyperCache) -> None:
    layers = [layer(index) for index in range(3)]
    model = Stack(*(layers[place] for place in places))
    with pytest.raises(ValueError, match=r"layer \d is called out of turn|one token at a time"):
        in_steps(model, cache, [3, 1, 1, 1])


def test_a_copied_layer_does_not_share_the_part_of_its_original(cache: HyperCache) -> None:
    first = layer(0)
    with pytest.raises(ValueError, match="layer 0 was filled by another layer of that layer_idx"):
        Stack(first, copy.deepcopy(first))(torch.randn(1, 3, 8, dtype=torch.float64), cache=cache)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"])
@pytest.mark.parametrize("together", [True, False])
def test_copies_of_caches_go_on(how, together: bool, cache: HyperCache) -> None:
    model, x = Stack(layer(0), layer(1)), torch.randn(2, 9, 8, dtype=torch.float64)
    model(x[:, :7], cache=cache)
    model_again, again = how((model, cache)) if together else (model, how(cache))
    for one, other in ((model, cache), (model_again, again)):
        out = torch.cat([one(x[:, i : i + 1], cache=other) for i in (7, 8)], dim=1)
        torch.testing.assert_close(out, model(x)[:, 7:])


def test_another_model_goes_on_when_the_first_is_gone_or_by_a_state_dict() -> None:
    model, x, cache = Stack(layer(0), layer(1)), torch.randn(2, 9, 8, dtype=torch.float64), HyperCache()
    expected = model(x)[:, 7:8]
    model(x[:, :7], cache=cache)
    twin = copy.deepcopy(model)
    with pytest.raises(ValueError, match="another layer"):
        twin(x[:, 7:8], cache=cache)
    handed = HyperCache()
    handed.load_state_dict(cache.state_dict(), {m.layer_idx: CacheSpec.of(m.config) for m in twin.layers})
    torch.testing.assert_close(twin(x[:, 7:8], cache=handed), expected)
    del model
    gc.collect()
    torch.testing.assert_close(twin(x[:, 7:8], cache=cache), expected)


def language_model() -> LanguageModel:
    attention = HyperConfig(8, 2, max_lag=16)
    return LanguageModel(LanguageModelConfig(11, 8, 3, attention, intermediate_size=16)).requires_grad_(False)


@pytest.mark.parametrize("times", ["one twice", "all thrice", "a copy"])
def test_blocks_of_a_language_model_that_share_weights(times: str, cache: HyperCache) -> None:
    model = language_model()
    if times == "one twice":
        model.blocks[2] = model.blocks[0]
    elif times == "all thrice":  # at the cache alone it looks like three steps
        model.layers = nn.ModuleList([model.blocks[0]] * 3)
    else:
        model.blocks[1] = copy.deepcopy(model.blocks[0])
    model(torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="each needs its own"):
        model(torch.zeros(1, 5, dtype=torch.long), cache=cache)
    assert not cache.layers, "an error changes nothing"


def test_engines_find_layers_and_may_replace_them(cache: HyperCache) -> None:
    model = language_model()
    names = set(model.state_dict())
    assert model.layers is model.blocks
    assert not [name for name in names if name.startswith("layers.")]
    model.layers = nn.ModuleList([model.layers[0], model.layers[2]])
    assert set(model.state_dict()) == {name for name in names if not name.startswith("blocks.2.")}
    ids = torch.randint(11, (2, 9))
    found = torch.cat([model(part, cache=cache) for part in ids.split([7, 1, 1], dim=1)], dim=1)
    torch.testing.assert_close(found, model(ids), rtol=1e-4, atol=1e-5)
