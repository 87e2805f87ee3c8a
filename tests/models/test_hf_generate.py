"""``generate`` with a cache equals ``generate`` without, however Transformers drives it."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch

from tests.hf_names import quiet
from tests.models.families import ATTENTION, VOCAB, left_padded, tiny, tokens

from transformers import DynamicCache, StaticCache  # isort: skip
from transformers.cache_utils import Cache, DynamicLayer  # isort: skip

from hypermlp import HyperCache
from hypermlp.integrations.huggingface.cache import HostCacheLayer
from hypermlp.integrations.huggingface.names import CACHE_NAME

MIXERS = list(ATTENTION)
NEW = 14


def run(model, ids, mask=None, seed=0, **options):
    torch.manual_seed(seed)
    # an end token that never comes: transformers 5.5 cannot look prompts up without one
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": VOCAB, **options}
    return model.generate(ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **options)


WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "beams": {"num_beams": 4},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "static": {"cache_implementation": "static"},
    "static beams": {"cache_implementation": "static", "num_beams": 3},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "chunks": {"prefill_chunk_size": 4},
    "static chunks": {"prefill_chunk_size": 4, "cache_implementation": "static"},
}
WITHOUT_CACHE = {"cache_implementation", "prompt_lookup_num_tokens", "prefill_chunk_size"}


def uncached(model, ids, mask=None, **options):
    options = {name: value for name, value in options.items() if name not in WITHOUT_CACHE}
    return run(model, ids, mask, use_cache=False, **options)


@pytest.mark.parametrize(
    ("mixer", "way"),
    [("hyperglu", way) for way in WAYS]
    + [(mixer, way) for mixer in MIXERS[1:] for way in ("greedy", "beams", "static", "lookup")],
)
def test_every_way_equals_no_cache(mixer, way):
    batch, said = 1 if way == "lookup" else 2, set()
    for seed in range(3 if way in ("beams", "lookup") else 1):
        model, ids = tiny(mixer, seed), tokens(batch, 7, seed)
        if way == "lookup":  # something to look up
            ids = torch.cat((ids, ids[:, 1:5]), dim=1)
        expected = uncached(model, ids, **WAYS[way])
        torch.testing.assert_close(run(model, ids, **WAYS[way]), expected, rtol=0, atol=0)
        said |= set(expected[:, ids.shape[1] :].flatten().tolist())
    assert len(said) > 2, "the models say too little to tell"


@pytest.mark.parametrize(
    ("mixer", "way"),
    [("hyperglu", way) for way in ("greedy", "beams", "static", "static beams", "chunks", "static chunks")]
    + [(mixer, way) for mixer in MIXERS[1:] for way in ("greedy", "static")],
)
def test_left_padded_prompts_equal_each_alone(mixer, way):
    model, (ids, mask) = tiny(mixer), left_padded([3, 8, 1])
    together = run(model, ids, mask, **WAYS[way])
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = uncached(model, ids[row : row + 1, -length:], **WAYS[way])
        torch.testing.assert_close(together[row, -NEW:], alone[0, -NEW:], rtol=0, atol=0)


@pytest.mark.parametrize("way", ["greedy", "beams", "static", "lookup"])
def test_one_token_prompts(way):
    model, ids = tiny(), tokens(1, 1)
    torch.testing.assert_close(run(model, ids, **WAYS[way]), uncached(model, ids, **WAYS[way]), rtol=0, atol=0)


@pytest.mark.parametrize("way", ["greedy", "beams", "static", "lookup", "chunks"])
def test_layers_of_different_kinds_in_one_model(way):
    model = tiny(attention=[ATTENTION["softmax"], ATTENTION["hyperglu"]])
    ids = tokens(1, 7)
    assert torch.equal(run(model, ids, **WAYS[way]), uncached(model, ids, **WAYS[way]))


def test_tables_by_position():
    model = tiny(attention={**ATTENTION["hyperglu"], "layout": "position", "max_lag": 24})
    ids, mask = left_padded([3, 8])
    together = run(model, ids, mask)
    for row, length in enumerate((3, 8)):
        assert torch.equal(together[row, -NEW:], uncached(model, ids[row : row + 1, -length:])[0, -NEW:])
    for way in ({}, {"use_cache": False}):
        with pytest.raises(ValueError, match="24"):
            run(model, ids, mask, max_new_tokens=20, **way)
    with pytest.raises(ValueError, match="layout='lag'"):
        run(model, ids, mask, cache_implementation="static")


@pytest.mark.parametrize("mixer", ["hyperglu", "hypermlp"])
def test_far_past_the_window(mixer):
    model, ids = tiny(mixer), tokens(1, 60)
    cache, held = DynamicCache(config=model.config), []
    found = run(model, ids, **{CACHE_NAME: cache}, max_new_tokens=40)
    held.append(cache.layers[0].memory.nbytes)
    longer = run(model, found, **{CACHE_NAME: cache}, max_new_tokens=60)
    held.append(cache.layers[0].memory.nbytes)
    assert torch.equal(longer, uncached(model, ids, max_new_tokens=100))
    if mixer == "hyperglu":  # 11 tokens and what crop may take back
        assert held[0] == held[1]


def test_embeddings_may_be_the_prompt():
    model, ids = tiny(), tokens(2, 6)
    prompt = model.get_input_embeddings()(ids)
    found = model.generate(inputs_embeds=prompt, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(found, uncached(model, ids)[:, 6:])


def test_the_end_token_ends_it():
    model, ids = tiny(), tokens(1, 6)
    told = uncached(model, ids)[0, 6:].tolist()
    model.generation_config.eos_token_id = told[3]
    found = model.generate(ids, max_new_tokens=NEW, do_sample=False)[0, 6:].tolist()
    assert found == told[: told.index(told[3]) + 1]


def test_assistant_model():
    with quiet():
        for seed in range(3):
            model, assistant, ids = tiny(seed=seed), tiny("softmax", seed + 100), tokens(1, 6, seed)
            assert torch.equal(run(model, ids, assistant_model=assistant), uncached(model, ids))
        # an assistant of the same weights guesses right, so both caches run far before they are cropped
        assert torch.equal(run(model, ids, assistant_model=copy.deepcopy(model)), uncached(model, ids))


@pytest.mark.parametrize("kind", ["bare", "dynamic", "static"])
def test_a_cache_serves_two_turns(kind):
    model, ids = tiny(), tokens(2, 6)
    if kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=64)
    else:
        cache = DynamicCache() if kind == "bare" else DynamicCache(config=model.config)
    first = run(model, ids, **{CACHE_NAME: cache})
    longer = torch.cat((first, tokens(2, 5, seed=9)), dim=1)
    assert torch.equal(run(model, longer, **{CACHE_NAME: cache}), uncached(model, longer))
    assert cache.get_seq_length() == longer.shape[1] + NEW - 1


def test_a_copied_cache_goes_its_own_way():
    model, ids = tiny(), tokens(2, 9)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        full = model(ids).logits
        model(ids[:, :5], **{CACHE_NAME: cache})
        other = copy.deepcopy(cache)
        model(tokens(2, 3, seed=5), **{CACHE_NAME: other})
        torch.testing.assert_close(model(ids[:, 5:], **{CACHE_NAME: cache}).logits, full[:, 5:])


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("split", [[5, 1, 1, 1, 1, 1, 1, 1], [4, 5, 3], [1, 11], [11, 1]])
def test_any_split_gives_the_logits_of_one_run(mixer, split):
    model, ids = tiny(mixer), tokens(3, 12)
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        parts = [model(part, **{CACHE_NAME: cache}).logits for part in ids.split(split, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids, use_cache=False).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("static", [True, False])
def test_reset_starts_afresh(static):
    model, ids = tiny(), tokens(2, 6)
    cache = StaticCache(config=model.config, max_cache_len=32) if static else DynamicCache(config=model.config)
    first = run(model, ids, **{CACHE_NAME: cache})
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(run(model, ids, **{CACHE_NAME: cache}), first)


def test_the_cache_speaks_transformers():
    model, ids = tiny(), tokens(2, 6)
    dynamic, static = DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=20)
    with torch.no_grad():
        for cache in (dynamic, static):
            assert cache.get_seq_length() == 0
            model(ids, **{CACHE_NAME: cache})
            assert cache.get_seq_length() == 6
    assert (dynamic.is_compileable, static.is_compileable) == (False, True)
    assert dynamic.get_mask_sizes(2, 0) == (8, 0)
    assert static.get_mask_sizes(2, 0) == (20, 0)


@pytest.mark.parametrize("mixer", MIXERS)
def test_rows_and_tokens_can_be_taken_from_the_cache(mixer):
    model, ids = tiny(mixer), tokens(2, 14)
    order = torch.tensor([1, 1, 0])

    def after(change, rows, length):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :length], **{CACHE_NAME: cache})
            change(cache)
            step = model(rows[:, -1:], **{CACHE_NAME: cache}).logits
            torch.testing.assert_close(step, model(rows, use_cache=False).logits[:, -1:], rtol=0, atol=1e-10)

    after(lambda cache: cache.reorder_cache(torch.tensor([1, 0])), ids[[1, 0]], 13)
    after(lambda cache: cache.batch_select_indices(order), ids[order], 13)
    after(lambda cache: cache.batch_repeat_interleave(2), ids.repeat_interleave(2, 0), 13)
    after(lambda cache: cache.crop(-3), ids[:, :11], 13)
    after(lambda cache: cache.crop(0), ids, 13)
    after(lambda cache: cache.crop(10), ids[:, :11], 13)  # the older meaning: tokens to keep


def test_what_a_cache_cannot_do_is_an_error():
    model, ids = tiny(), tokens(2, 6)
    with torch.no_grad():
        with pytest.raises(TypeError, match="HyperCache"):
            model(ids, **{CACHE_NAME: HyperCache()})
        filled = DynamicLayer()
        filled.update(torch.zeros(2, 2, 1, 4), torch.zeros(2, 2, 1, 4))
        with pytest.raises(ValueError, match="filled"):
            model(ids, **{CACHE_NAME: Cache(layers=[filled, DynamicLayer()])})
        cache = DynamicCache(config=model.config)
        model(ids, **{CACHE_NAME: cache})
        for rows, mask, message in (
            (ids[:1], None, "batch"),
            (ids, torch.ones(2, 7), r"6 new tokens or all 12, got 7"),
        ):
            with pytest.raises(ValueError, match=message):
                model(rows, mask, **{CACHE_NAME: cache})
        with pytest.raises(ValueError, match="filled by another layer"):
            tiny("softmax")(ids, **{CACHE_NAME: cache})
        with pytest.raises(ValueError, match="packed"):
            model(ids, **{CACHE_NAME: cache}, cu_seq_lens_q=torch.tensor([0, 6, 12]))
        assert cache.get_seq_length() == 6
        cache = StaticCache(config=model.config, max_cache_len=8)
        model(ids, **{CACHE_NAME: cache})
        with pytest.raises(ValueError, match="crop"):
            cache.layers[0].crop(-1)
    with pytest.raises(RuntimeError, match="no_grad"):
        model(ids, use_cache=True)


@pytest.mark.parametrize("kind", ["quantized", "offloaded", "offloaded_static"])
def test_quantized_and_offloaded_caches_are_refused_before_a_package_is_asked_for(kind):
    with pytest.raises(ValueError, match=f"hyper layers cannot use cache_implementation='{kind}'"):
        run(tiny(), tokens(1, 4), cache_implementation=kind)


def test_continuous_batching_is_refused():
    model = tiny()
    for way in (lambda: model.generate_batch([[3, 4, 5], [5, 6]], max_new_tokens=3), model.init_continuous_batching):
        with pytest.raises(NotImplementedError, match="padded on the left"):
            way()


# Broken variants: what the tests above would not notice would not be tested by them.


def generations_differ(seeds, **options):
    differ = 0
    for seed in seeds:
        model, ids = tiny(seed=seed), tokens(1, 7, seed)
        ids = torch.cat((ids, ids[:, 1:5]), dim=1)
        differ += not torch.equal(run(model, ids, **options), uncached(model, ids, **options))
    return differ


def test_a_cache_without_convolution_state_is_noticed():
    model, ids = tiny(), tokens(2, 9)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        full = model(ids).logits[:, 8:]
        model(ids[:, :8], **{CACHE_NAME: cache})
        torch.testing.assert_close(model(ids[:, 8:], **{CACHE_NAME: cache}).logits, full)
        cache.crop(-1)
        for layer in cache.layers:
            state = layer.memory.state_dict()
            [name] = [name for name in state if name.endswith(".inputs")]
            specs = {layer.layer_idx: model.model.layers[layer.layer_idx].attention.cache_spec}
            layer.memory.load_state_dict(state | {name: torch.zeros_like(state[name])}, specs)
        assert not torch.allclose(model(ids[:, 8:], **{CACHE_NAME: cache}).logits, full)


def test_a_cache_that_does_not_reorder_is_noticed():
    with mock.patch.object(HostCacheLayer, "reorder_cache"):
        assert generations_differ(range(4), num_beams=4)


def test_a_cache_that_does_not_crop_is_noticed():
    with mock.patch.object(HostCacheLayer, "crop"):
        try:
            noticed = generations_differ(range(4), prompt_lookup_num_tokens=3) > 0
        except ValueError as error:  # older versions count tokens themselves, and the mask does not fit
            noticed = "attention_mask must count" in str(error)
    assert noticed


def test_an_ignored_mask_is_noticed():
    model, (ids, mask) = tiny(), left_padded([3, 8])
    alone = uncached(model, ids[:1, -3:])[0, -NEW:]
    assert torch.equal(run(model, ids, mask)[0, -NEW:], alone)
    assert not torch.equal(run(model, ids, torch.ones_like(mask))[0, -NEW:], alone)
