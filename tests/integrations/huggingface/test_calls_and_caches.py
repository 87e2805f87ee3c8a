"""Hyper layers in models of transformers: calls, masks, caches; each check with a module that fails it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from hypermlp import HyperCache, restore_attention, swap_attention
from hypermlp.cache import LayerCache
from hypermlp.integrations.huggingface import attention as attention_module
from hypermlp.integrations.huggingface.attention import HuggingFaceAttention
from hypermlp.integrations.huggingface.cache import HostCacheLayer, HyperStaticLayer
from hypermlp.integrations.huggingface.masks import read_mask
from hypermlp.integrations.huggingface.names import CACHE_NAME
from hypermlp.ops.varlen import Tokens
from tests.hf_names import quiet
from tests.integrations.huggingface import checks
from tests.integrations.huggingface.hosts import (
    BUILD,
    DECODERS,
    FOUR,
    cache_of,
    logits,
    stock,
    swapped,
    tokens,
)

ATTENTION = ["sdpa", "eager"]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    checks.quiet()


def fails(check: Any, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(AssertionError):
        check(*args, **kwargs)


@pytest.mark.parametrize("name", BUILD)
def test_every_layer_is_called_and_rows_are_independent(name: str) -> None:
    checks.check_called(swapped(name))


def test_a_bare_tensor_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = swapped("gpt2")
    forward = HuggingFaceAttention.forward
    monkeypatch.setattr(HuggingFaceAttention, "forward", lambda self, *args, **kw: forward(self, *args, **kw)[0])
    with pytest.raises((AssertionError, ValueError)):
        checks.check_called(model)


@pytest.mark.parametrize("attn", ATTENTION)
@pytest.mark.parametrize("name", DECODERS)
def test_causality(name: str, attn: str) -> None:
    checks.check_causal(swapped(name, attn=attn))


def test_a_look_ahead_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = swapped("llama")
    for layer in checks.attentions(model):
        forward = layer.mixer.forward
        layer.mixer.forward = lambda x, *args, forward=forward, **kw: forward(x, *args, **kw) + 0.1 * x.roll(-1, 1)
    fails(checks.check_causal, model)


@pytest.mark.parametrize("attn", ATTENTION)
@pytest.mark.parametrize("name", DECODERS)
def test_stepwise_equals_whole(name: str, attn: str) -> None:
    model = swapped(name, attn=attn)
    checks.check_stepwise(model)
    checks.check_stepwise(model, sizes=(1, 6, 2), cache=transformers.DynamicCache())
    checks.check_stepwise(model, sizes=(5, 1, 1, 3), cache=cache_of(model, static=12))


@pytest.mark.parametrize("mixer", ["hypermlp", "relu", "softmax"])
def test_every_mixer(mixer: str) -> None:
    model = swapped("llama", mixer=mixer)
    checks.check_stepwise(model)
    checks.check_padding(model)
    checks.check_packed(model)


def test_a_lost_convolution_state_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LayerCache, "inputs", lambda self, like: like.new_zeros(like.shape[0], 3, like.shape[2]))
    fails(checks.check_stepwise, swapped("llama"))


def test_a_window_shorter_than_the_sequence() -> None:
    model = swapped("llama", max_lag=4)
    checks.check_stepwise(model)
    checks.check_stepwise(model, sizes=(3, 1, 1, 1), cache=cache_of(model, static=6))
    checks.check_padding(model)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attn", ATTENTION)
@pytest.mark.parametrize("name", BUILD)
def test_padding_is_as_if_it_were_not_there(name: str, attn: str, side: str) -> None:
    checks.check_padding(swapped(name, attn=attn), side)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_an_ignored_mask_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_module, "read_mask", lambda *args, **kwargs: Tokens())
    fails(checks.check_padding, swapped(name))


@pytest.mark.parametrize("attn", ATTENTION)
@pytest.mark.parametrize("name", FOUR)
def test_packed_documents_are_separate(name: str, attn: str) -> None:
    model = swapped(name, attn=attn)
    checks.check_packed(model)
    checks.check_packed(model, batch=2)


def test_ignored_packing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*args: Any, **kwargs: Any) -> Tokens:
        return read_mask(*args, **kwargs)._replace(cu_seqlens=None)

    monkeypatch.setattr(attention_module, "read_mask", read)
    fails(checks.check_packed, swapped("llama"))


@pytest.mark.parametrize("kind", checks.GENERATE)
@pytest.mark.parametrize("name", FOUR)
def test_generate(name: str, kind: str) -> None:
    checks.check_generate(swapped(name), kind, seeds=2 if kind in ("beam", "lookup") else 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", checks.GENERATE)
@pytest.mark.parametrize("attn", ATTENTION)
@pytest.mark.parametrize("name", DECODERS)
def test_generate_often(name: str, attn: str, kind: str) -> None:
    checks.check_generate(swapped(name, attn=attn), kind, seeds=6)


@pytest.mark.parametrize("kind", ["greedy", "static", "beam"])
def test_generate_under_eager_masks(kind: str) -> None:
    checks.check_generate(swapped("llama", attn="eager"), kind)


@pytest.mark.parametrize("kwargs", [{}, {"cache_implementation": "static"}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("name", FOUR)
def test_generate_from_ragged_prompts(name: str, kwargs: dict[str, Any]) -> None:
    checks.check_generate_padded(swapped(name), **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_generate_with_a_compiled_step(name: str) -> None:
    """A static cache's step is one graph; transformers compiles it by itself on a GPU."""
    model: Any = swapped(name)
    ids = tokens(2, 7)
    compiling = transformers.CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compiling._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    out = checks.generate(model, ids, cache_implementation="static", compile_config=compiling, disable_compile=False)
    assert torch.equal(out, checks.generate(model, ids, use_cache=False))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_cross_attention_goes_on_beside() -> None:
    for name in ("gpt2", "bert_decoder"):
        model: Any = stock(name, add_cross_attention=True)
        report = swap_attention(model)
        assert all("crossattention" in entry.name for entry in report.left)
        assert len(report.left) == 2
        ids, read = tokens(2, 7), torch.randn(2, 4, 32, dtype=torch.float64)
        whole = logits(model, ids, encoder_hidden_states=read, use_cache=False)
        with torch.no_grad():
            cache = getattr(model(ids[:, :4], encoder_hidden_states=read, use_cache=True), CACHE_NAME)
        rest = logits(model, ids[:, 4:], encoder_hidden_states=read, **{CACHE_NAME: cache}, use_cache=True)
        assert checks.error(rest, whole[:, 4:]) < checks.TOLERANCE


def test_generate_again_and_again_with_static_caches() -> None:
    """Versions of transformers that keep the last one take it again where it fits."""
    model: Any = swapped("llama")
    for shape in ((2, 7), (2, 5), (2, 12), (1, 5), (2, 7)):
        ids = tokens(*shape, seed=sum(shape))
        out = checks.generate(model, ids, cache_implementation="static")
        assert torch.equal(out, checks.generate(model, ids, use_cache=False)), shape


def test_generate_from_one_token() -> None:
    model = swapped("llama")
    ids = tokens(2, 1)
    assert torch.equal(checks.generate(model, ids), checks.generate(model, ids, use_cache=False))


def test_assisted_generation() -> None:
    """Another model proposes tokens; those refused are cropped from our cache."""
    model: Any = swapped("llama")
    ids = tokens(1, 6)
    with quiet():
        out = checks.generate(model, ids, assistant_model=swapped("llama", seed=1))
    assert torch.equal(out, checks.generate(model, ids, use_cache=False))


def test_a_second_generate_goes_on_from_the_cache() -> None:
    model: Any = swapped("llama")
    ids = tokens(1, 6)
    cache = cache_of(model)
    first = checks.generate(model, ids, **{CACHE_NAME: cache}, new_tokens=4)
    longer = torch.cat((first, tokens(1, 3, seed=5)), dim=1)
    assert torch.equal(
        checks.generate(model, longer, **{CACHE_NAME: cache}), checks.generate(model, longer, use_cache=False)
    )


@pytest.mark.parametrize(
    ("kind", "owner", "name"),
    [
        ("beam", HostCacheLayer, "reorder_cache"),
        ("static beam", HyperStaticLayer, "reorder_cache"),
        ("lookup", HostCacheLayer, "crop"),
    ],
)
def test_a_cache_that_does_not_follow_is_noticed(
    kind: str, owner: type, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, lambda *args: None, raising=False)
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        checks.check_generate(swapped("llama"), kind, seeds=6)


def test_host_without_its_name_for_the_cache_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-NeoX says ``layer_past``."""
    forward = HuggingFaceAttention.forward

    def deaf(self: Any, *args: Any, layer_past: Any = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(HuggingFaceAttention, "forward", deaf)
    fails(checks.check_stepwise, swapped("gpt_neox"))


def test_part_of_the_layers() -> None:
    for layers in ([0], [1]):
        for name in ("llama", "gpt2"):
            model = swapped(name, layers=layers)
            checks.check_stepwise(model)
            checks.check_generate(model, "beam")
            checks.check_generate(model, "static")
            checks.check_padding(model)


def test_repeat_select_reset_and_copy_of_a_cache() -> None:
    model: Any = swapped("llama")
    ids = tokens(2, 9)
    whole = logits(model, ids)
    cache = cache_of(model)
    logits(model, ids[:, :5], **{CACHE_NAME: cache}, use_cache=True)
    kept = copy.deepcopy(cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    rest = logits(model, ids[:, 5:].flip(0), **{CACHE_NAME: cache}, use_cache=True)
    assert checks.error(rest, whole[:, 5:].flip(0)) < checks.TOLERANCE
    assert (
        checks.error(logits(model, ids[:, 5:], **{CACHE_NAME: kept}, use_cache=True), whole[:, 5:]) < checks.TOLERANCE
    )
    cache.reset()
    assert cache.get_seq_length() == 0
    assert checks.error(logits(model, ids, **{CACHE_NAME: cache}, use_cache=True), whole) < checks.TOLERANCE


def test_a_cache_of_layers_is_told_from_transformers_own() -> None:
    with pytest.raises((AttributeError, TypeError), match=r"DynamicCache\(config=model\.config\)"):
        swapped("llama")(tokens(1, 4), **{CACHE_NAME: HyperCache()})
    assert copy.deepcopy(HyperCache()).lengths is None
    assert not hasattr(HyperCache(), "is_compileable")
    with pytest.raises(AttributeError, match=r"HyperCache has no 'reoder': did you mean reorder\?"):
        HyperCache().reoder(0)  # type: ignore[attr-defined]
    broken = HyperCache()
    broken.layers = {0: object()}  # type: ignore[dict-item]
    with pytest.raises(AttributeError, match="'object' object has no attribute"):
        broken.nbytes  # noqa: B018  a property's own error
    compiled = torch.compile(lambda x, cache: x + hasattr(cache, "is_compileable"), backend="eager", fullgraph=True)
    assert compiled(torch.ones(1), HyperCache()) == 1


def test_continuous_batching_is_refused() -> None:
    """At once; what is copied, and not what has been restored."""
    for name in ("llama", "gpt2"):
        model: Any = swapped(name)
        for refusing in (model, copy.deepcopy(model)):
            with pytest.raises(NotImplementedError, match="padded on the left"):
                refusing.generate_batch([[3, 4, 5], [5, 6]], max_new_tokens=3)
        restore_attention(model)
        assert model.init_continuous_batching.__func__ is type(model).init_continuous_batching
