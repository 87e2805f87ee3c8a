"""``extend_max_lag``: a longer context without a change to what was seen before."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from torch.nn.utils import parametrize, prune

from hypermlp import HyperCache, HyperConfig, HyperGLU, HyperMLP, SoftmaxAttention
from hypermlp.generation import generate
from hypermlp.integrations import resize_positions
from hypermlp.models import LanguageModel, LanguageModelConfig, extend_max_lag
from hypermlp_lab.training.recipe import parameter_count

OLD, NEW, HIDDEN = 8, 19, 16
FILLS = ["identity", "continue"]


def layer(cls=HyperGLU, **options):
    torch.manual_seed(0)
    made = cls(HIDDEN, max_lag=OLD, mix_rank=3, dtype=torch.float64, **options)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("cls", [HyperGLU, HyperMLP])
def test_what_fits_the_old_window_is_the_same(cls, fill):
    made, x = layer(cls), torch.randn(2, NEW, HIDDEN, dtype=torch.float64)
    short, long = made(x[:, :OLD]), made(x)
    assert extend_max_lag(made, NEW, fill=fill) == 1
    assert torch.equal(made(x[:, :OLD]), short)
    after = made(x)
    torch.testing.assert_close(after[:, :OLD], long[:, :OLD], rtol=0, atol=1e-12)
    assert not torch.allclose(after[:, OLD:], long[:, OLD:])
    assert made.config.max_lag == made.routing_mix.max_lag == made.readout_mix.max_lag == NEW


def test_identity_rows_mix_nothing():
    made = layer()
    before = {name: p.detach().clone() for name, p in made.named_parameters()}
    extend_max_lag(made, NEW)
    for name, parameter in made.named_parameters():
        old = before[name]
        if "mix." not in name:
            assert torch.equal(parameter, old)
            continue
        assert parameter.shape == (old.shape[0], NEW, *old.shape[2:])
        assert torch.equal(parameter[:, :OLD], old)
        assert not parameter[:, OLD:].any()


def test_continued_rows_are_the_mean_of_the_last_eighth():
    torch.manual_seed(0)
    made = HyperMLP(HIDDEN, max_lag=32, mix_rank=2)
    torch.nn.init.normal_(made.routing_mix.diag)
    old = made.routing_mix.diag.detach().clone()
    extend_max_lag(made, 40, fill="continue")
    new = made.routing_mix.diag
    assert torch.equal(new[:, :32], old)
    torch.testing.assert_close(new[:, 32:], old[:, 28:32].mean(1, keepdim=True).expand(-1, 8))


def test_new_rows_are_trained():
    made = layer()
    extend_max_lag(made, NEW)
    made(torch.randn(1, NEW, HIDDEN, dtype=torch.float64)).square().sum().backward()
    for table in (made.routing_mix.diag, made.routing_mix.up, made.routing_mix.down, made.readout_mix.diag):
        assert table.grad[:, OLD:].any()


def test_frozen_tables_stay_frozen():
    made = layer().requires_grad_(False)
    extend_max_lag(made, NEW)
    assert not any(parameter.requires_grad for parameter in made.parameters())


def language_model(**options):
    torch.manual_seed(0)
    attention = HyperConfig(HIDDEN, max_lag=OLD, mix_rank=2)
    return LanguageModel(LanguageModelConfig(11, HIDDEN, 2, attention, **options), dtype=torch.float64).eval()


def test_a_language_model_and_its_config():
    model, tokens = language_model(context_length=OLD), torch.randint(11, (1, NEW))
    before = model(tokens[:, :OLD])
    assert extend_max_lag(model, NEW) == 2
    assert model.config.attention.max_lag == model.config.context_length == NEW
    assert torch.equal(model(tokens[:, :OLD]), before)
    again = LanguageModel(model.config, dtype=torch.float64)
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(tokens), model(tokens), rtol=0, atol=1e-12)


def reopened(model):
    """As it is described in JSON, with the same weights."""
    again = LanguageModel(LanguageModelConfig(**json.loads(json.dumps(model.config.to_dict()))), dtype=torch.float64)
    again.load_state_dict(model.state_dict())
    assert again.config == model.config
    return again


@torch.no_grad()
def test_layers_extended_one_by_one_are_described():
    model, tokens = language_model(context_length=OLD), torch.randint(11, (1, NEW))
    assert extend_max_lag(model.blocks[1].attention, NEW) == 1
    assert model.config.max_lags == (OLD, NEW)
    assert model.config.context_length == NEW
    assert [model.config.attention_config(index).max_lag for index in range(2)] == [OLD, NEW]
    assert torch.equal(reopened(model)(tokens), model(tokens))
    assert parameter_count(model.config) == model.num_parameters()
    assert copy.deepcopy(model).config == pickle.loads(pickle.dumps(model)).config == model.config
    for use_cache in (True, False):
        options = {"temperature": 0, "use_cache": use_cache}
        assert torch.equal(generate(reopened(model), tokens, 6, **options), generate(model, tokens, 6, **options))
    # the last one, too, is as if all had been extended at once
    extend_max_lag(model.blocks[0], NEW)
    whole = language_model(context_length=OLD)
    extend_max_lag(whole, NEW)
    assert model.config == whole.config
    assert model.config.max_lags is None


@torch.no_grad()
def test_a_model_is_extended_on_from_layers_that_were():
    model, tokens = language_model(), torch.randint(11, (1, NEW))
    extend_max_lag(model.blocks[0], NEW)
    assert extend_max_lag(model, 10) == 1
    assert model.config.max_lags == (NEW, 10)
    assert torch.equal(reopened(model)(tokens), model(tokens))


@torch.no_grad()
@pytest.mark.parametrize("lags", [None, (OLD, 12, 14)])
@pytest.mark.parametrize("gone", [slice(1, None), slice(0, 1), slice(3, None)])
def test_a_model_cut_short_is_described(gone, lags):
    torch.manual_seed(0)
    attention = HyperConfig(HIDDEN, max_lag=OLD, mix_rank=2)
    model = LanguageModel(LanguageModelConfig(11, HIDDEN, 3, attention, max_lags=lags), dtype=torch.float64).eval()
    del model.blocks[gone]
    tokens = torch.randint(11, (1, NEW))
    assert torch.equal(reopened(model)(tokens), model(tokens))
    extend_max_lag(model, NEW)
    assert model.config.attention.max_lag == NEW
    assert model.config.num_layers == len(model.blocks)
    assert torch.equal(reopened(model)(tokens), model(tokens))
    model.blocks.append(copy.deepcopy(model.blocks[0]))
    assert torch.equal(reopened(model)(tokens), model(tokens))


def test_a_softmax_model_cut_short_is_described():
    model = LanguageModel(LanguageModelConfig(11, HIDDEN, 3, HyperConfig(HIDDEN, mixer="softmax")))
    del model.blocks[1]
    assert model.config.num_layers == 2
    del model.blocks[:]
    assert model.config.num_layers == 3  # a model has some


@torch.no_grad()
def test_tables_by_position_resized_are_described():
    torch.manual_seed(0)
    attention = HyperConfig(HIDDEN, max_lag=OLD, mix_rank=2, layout="position")
    model = LanguageModel(LanguageModelConfig(11, HIDDEN, 2, attention), dtype=torch.float64).eval()
    resize_positions(model.blocks[0], 12)
    assert model.config.max_lags == (12, OLD)
    resize_positions(model.blocks[1], 10)
    tokens = torch.randint(11, (1, 8))
    assert torch.equal(reopened(model)(tokens), model(tokens))
    assert generate(model, tokens, 12, seed=0).shape == (1, 20)  # the shortest tables are the context


def test_the_family_takes_layers_extended_one_by_one(tmp_path):
    pytest.importorskip("transformers", minversion="5.5", reason="needs the hf extra")
    from hypermlp.models.huggingface import HyperMLPForCausalLM

    model, tokens = language_model(), torch.randint(11, (1, NEW))
    extend_max_lag(model.blocks[1], NEW)
    family = HyperMLPForCausalLM.from_language_model(model).double()
    family.save_pretrained(tmp_path)
    again = HyperMLPForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(again(tokens).logits, model(tokens), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("mixer", "lags", "match"),
    [
        ("hyperglu", (8,), "max_lags must be a number for each of num_layers=2"),
        ("hyperglu", 8, "max_lags must be a number for each"),
        ("hyperglu", (8, 0), "max_lags must be a positive integer, got 0"),
        ("softmax", (8, 8), "max_lags is for tables, which mixer='softmax' has not"),
    ],
)
def test_bad_lags_of_layers(mixer, lags, match):
    with pytest.raises(ValueError, match=match):
        LanguageModelConfig(11, HIDDEN, 2, HyperConfig(HIDDEN, mixer=mixer), max_lags=lags)


@torch.no_grad()
def test_cached_steps_see_the_new_window():
    model, tokens = language_model(), torch.randint(11, (1, NEW + 4))
    old_cache = HyperCache()
    model(tokens[:, :3], cache=old_cache)
    extend_max_lag(model, NEW)
    cache = HyperCache()
    steps = torch.cat([model(tokens[:, i : i + 1], cache=cache) for i in range(tokens.shape[1])], 1)
    torch.testing.assert_close(steps, model(tokens), rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="filled by another layer"):
        model(tokens[:, 3:4], cache=old_cache)


def test_native_family(tmp_path):
    families = pytest.importorskip("tests.models.families", reason="needs the hf extra")
    model, ids = families.tiny(), families.tokens(2, 30)
    before = model(ids[:, :11]).logits
    assert extend_max_lag(model, 25) == 2
    torch.testing.assert_close(model(ids[:, :11]).logits, before, rtol=0, atol=1e-12)
    assert model.config.attention_config(0).max_lag == 25
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=1e-10)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def test_swapped_model(tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.5", reason="needs the hf extra")
    from hypermlp import swap_attention
    from hypermlp.integrations.huggingface import from_pretrained

    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50, n_positions=64)
    model = transformers.GPT2LMHeadModel(config).double().eval()
    swap_attention(model, "hyperglu", max_lag=OLD)
    ids = torch.randint(50, (1, 30))
    assert extend_max_lag(model, NEW) == 2
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=1e-10)


def test_one_layer_of_a_model_that_is_saved(tmp_path):
    families = pytest.importorskip("tests.models.families", reason="needs the hf extra")
    import transformers

    from hypermlp import swap_attention
    from hypermlp.integrations.huggingface import from_pretrained

    ids = torch.randint(8, (1, 30))
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50, n_positions=64)
    swapped = transformers.GPT2LMHeadModel(config).double().eval()
    swap_attention(swapped, "hyperglu", max_lag=OLD)
    native = families.tiny()
    for model, layers, opened in (
        (swapped, swapped.transformer.h, from_pretrained),
        (native, native.model.layers, None),
    ):
        extend_max_lag(layers[1], 25)
        model.save_pretrained(tmp_path / type(model).__name__)
        opened = opened or type(model).from_pretrained
        again = opened(tmp_path / type(model).__name__, dtype=torch.float64).eval()
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=1e-10)
        assert [m.config.max_lag for m in again.modules() if isinstance(m, HyperGLU)][1] == 25


@pytest.mark.parametrize(
    ("model", "max_lag", "options", "error", "match"),
    [
        (SoftmaxAttention(HIDDEN), 9, {}, ValueError, "nothing to extend$"),
        (
            HyperGLU(HIDDEN, max_lag=OLD, causal=False),
            9,
            {},
            ValueError,
            "nothing to extend; .*resize_positions",
        ),
        (HyperGLU(HIDDEN, max_lag=OLD), OLD, {}, ValueError, "more than the 8 lags"),
        (HyperGLU(HIDDEN, max_lag=OLD), 4, {}, ValueError, "more than the 8 lags"),
        (HyperGLU(HIDDEN, max_lag=OLD), 9.0, {}, TypeError, "integer"),
        (HyperGLU(HIDDEN, max_lag=OLD), 9, {"fill": "zeros"}, ValueError, "identity"),
    ],
)
def test_bad_input(model, max_lag, options, error, match):
    with pytest.raises(error, match=match):
        extend_max_lag(model, max_lag, **options)


def test_computed_tables_are_refused_before_anything_changes():
    made = torch.nn.ModuleList([layer(), layer()])
    prune.random_unstructured(made[1].routing_mix, "down", 0.5)
    with pytest.raises(ValueError, match=r"prune\.remove"):
        extend_max_lag(made, NEW)
    assert made[0].routing_mix.diag.shape[1] == made[0].config.max_lag == OLD
    made[0](torch.randn(1, NEW, HIDDEN, dtype=torch.float64))
    parametrize.register_parametrization(made[0].routing_mix, "diag", torch.nn.Identity())
    with pytest.raises(ValueError, match="remove_parametrizations"):
        extend_max_lag(made[0], NEW)


def test_shared_tables_stay_shared():
    first, second = layer(), layer()
    second.routing_mix.down = first.routing_mix.down
    with torch.inference_mode():
        extend_max_lag(torch.nn.ModuleList([first, second]), NEW)
    assert second.routing_mix.down is first.routing_mix.down
    first(torch.randn(1, NEW, HIDDEN, dtype=torch.float64)).sum().backward()


def test_models_without_such_layers_keep_their_configs():
    def model(mixer, max_lag):
        attention = HyperConfig(HIDDEN, mixer=mixer, max_lag=max_lag)
        return LanguageModel(LanguageModelConfig(11, HIDDEN, 1, attention, context_length=64))

    models = torch.nn.ModuleList([model("softmax", None), model("hyperglu", OLD), model("hyperglu", 100)])
    assert extend_max_lag(models, NEW) == 1
    assert [m.config.attention.max_lag for m in models] == [None, NEW, 100]


def test_a_hosts_window_is_the_most():
    transformers = pytest.importorskip("transformers", minversion="5.5", reason="needs the hf extra")
    from hypermlp import swap_attention

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.MistralConfig(vocab_size=50, sliding_window=6, num_key_value_heads=2, **sizes)
    model = transformers.MistralForCausalLM(config).eval()
    swap_attention(model, "hyperglu", max_lag=4)
    with pytest.raises(ValueError, match="sliding window of 6"):
        extend_max_lag(model, 7)
    assert extend_max_lag(model, 6) == 1
    model(torch.randint(50, (1, 20)))


@pytest.mark.parametrize(("name", "layers", "expected"), [("llama", None, 90), ("llama", [0], 64), ("gpt2", None, 64)])
def test_a_hosts_config_says_how_far_it_sees_where_nothing_is_bound_to_the_old_length(name, layers, expected):
    """Not where softmax layers stay, nor where positions are learnt."""
    hosts = pytest.importorskip("tests.integrations.huggingface.hosts", reason="needs the hf extra")
    from hypermlp import swap_attention

    model = hosts.stock(name)
    swap_attention(model, layers=layers)
    before = model.config
    assert before.max_position_embeddings == 64
    extend_max_lag(model, 90)
    assert model.config.max_position_embeddings == expected
    if expected == 90:
        assert model(torch.randint(3, 60, (1, 90))).logits.isfinite().all()


def test_the_native_familys_config_says_how_far_it_sees():
    families = pytest.importorskip("tests.models.families", reason="needs the hf extra")
    model = families.tiny()
    longer = model.config.max_position_embeddings + 5
    extend_max_lag(model, longer)
    assert model.config.max_position_embeddings == longer


def test_blocks_in_groups_are_no_fewer_layers():
    model = LanguageModel(LanguageModelConfig(11, HIDDEN, 4, HyperConfig(HIDDEN, max_lag=OLD)))
    before = model.config
    model.blocks = torch.nn.ModuleList([torch.nn.Sequential(*model.blocks[:2]), torch.nn.Sequential(*model.blocks[2:])])
    assert model.config == before
