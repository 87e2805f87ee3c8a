"""The Hugging Face family's configuration: how attention is given, saved and checked."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from tests.models.families import ATTENTION, tiny_config

from transformers import AutoConfig  # isort: skip

from hypermlp.config import HyperConfig
from hypermlp.models.huggingface import HyperMLPConfig

MIXERS = list(ATTENTION)


def test_attention_may_be_a_mapping_a_config_or_one_per_layer():
    described = HyperConfig(32, 4, mixer="hypermlp", max_lag=8)
    for given in (described, described.to_dict(), {"num_heads": 4, "mixer": "hypermlp", "max_lag": 8}):
        assert HyperMLPConfig(hidden_size=32, attention=given).attention_config(3) == described
    heads = HyperMLPConfig(hidden_size=32, num_attention_heads=4, attention={"mixer": "hypermlp", "max_lag": 8})
    assert heads.attention_config(0) == described
    mixed = HyperMLPConfig(hidden_size=32, num_hidden_layers=2, attention=[described, {"mixer": "softmax"}])
    assert mixed.attention_config(0) == described
    assert mixed.attention_config(1) == HyperConfig(32, mixer="softmax")


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_saved_config_says_everything(mixer, tmp_path):
    config = tiny_config(mixer, eos_token_id=3)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is HyperMLPConfig
    assert {**again.to_dict(), "_name_or_path": ""} == config.to_dict()
    stored = json.loads((tmp_path / "config.json").read_text())
    assert HyperConfig(**stored["attention"]) == config.attention_config(0)
    assert None not in (stored["attention"]["qk_dim"], stored["intermediate_size"])


def test_what_asks_for_nothing_and_what_a_subclass_calls_so_is_taken():
    class Named(HyperMLPConfig):
        attribute_map = {"n_layer": "num_hidden_layers"}  # noqa: RUF012

    config = Named(n_layer=3, sliding_window=None, head_dim=None, d_model=None)
    assert (config.num_hidden_layers, config.n_layer) == (3, 3)


def test_a_model_without_a_limit_is_extended():
    config = HyperMLPConfig(max_position_embeddings=None)
    config.extend_max_lag(4096)
    assert (config.attention_config(0).max_lag, config.max_position_embeddings) == (4096, None)


def test_integers_of_numpy_are_saved(tmp_path):
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    given = dict.fromkeys((*names, "pad_token_id", "eos_token_id"), np.int64(32))
    config = HyperMLPConfig(**given, use_cache=np.False_)
    config.save_pretrained(tmp_path)
    assert {name: getattr(AutoConfig.from_pretrained(tmp_path), name) for name in given} == dict.fromkeys(given, 32)
    assert config.use_cache is False
    assert config.intermediate_size == HyperMLPConfig(hidden_size=32).intermediate_size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be"),
        ({"hidden_size": 32}, r"attention\.hidden_size=16"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps must be"),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be"),
        ({"attention": {"causal": False}}, "causal"),
        ({"attention": {"qk_dim": 7}}, "qk_dim=7"),
        ({"attention": [{}, {}, {}]}, "num_hidden_layers=2"),
        ({"attention": [{"qk_dim": 8}, {"v_dim": 7}]}, "v_dim"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)
    with pytest.raises(TypeError, match="tie_word_embeddings must be True or False, got 1"):
        tiny_config(tie_word_embeddings=1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mixer": "softmax"}, r"mixer is a field of the attention layers: HyperMLPConfig\(attention={'mixer'"),
        ({"max_lag": 128}, "max_lag is a field of the attention layers"),
        ({"num_layers": 4}, r"num_layers is called num_hidden_layers here"),
        ({"context_length": 4}, r"context_length is called max_position_embeddings here"),
        ({"num_heads": 4}, r"num_heads is called num_attention_heads here"),
        ({"n_layer": 4}, r"n_layer is called num_hidden_layers here"),
        ({"n_head": 4}, r"n_head is called num_attention_heads here"),
        ({"n_embd": 4}, r"n_embd is called hidden_size here"),
        ({"n_inner": 4}, r"n_inner is called intermediate_size here"),
        ({"n_positions": 4}, r"n_positions is called max_position_embeddings here"),
        ({"layer_norm_epsilon": 4}, r"layer_norm_epsilon is called rms_norm_eps here"),
        ({"num_key_value_heads": 1}, "takes no 'num_key_value_heads': the family has nothing that it would change"),
        ({"hidden_act": "gelu"}, "takes no 'hidden_act'"),
        ({"sliding_window": 9}, r"sliding_window is here max_lag, a field of the .*\(attention={'max_lag': ...}\)"),
        ({"head_dim": 9}, r"head_dim is here qk_dim and v_dim, .*\(attention={'qk_dim': ..., 'v_dim': ...}\)"),
    ],
)
def test_names_of_other_configs_are_refused(given, message):
    with pytest.raises(TypeError, match=message):
        HyperMLPConfig(vocab_size=50, hidden_size=32, **given)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("num_hidden_layer", "num_hidden_layers"),
        ("hiden_size", "hidden_size"),
        ("attentions", "attention"),
        ("max_lags", "attention={'max_lag': ...}"),
    ],
)
def test_misspelt_names_are_refused(given, meant, tmp_path):
    """transformers keeps what it does not know, and nobody would read it."""
    with pytest.raises(TypeError, match=re.escape(f"HyperMLPConfig takes no '{given}': did you mean {meant}?")):
        HyperMLPConfig(**{given: 2})
    # names of transformers' own and of a user's stay
    config = HyperMLPConfig(sep_token_id=3, cls_token_id=4, num_labels=2, my_note="x", output_attentions=True)
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).my_note == "x"


def test_a_saved_config_with_such_a_name_opens_as_it_was(tmp_path):
    config = HyperMLPConfig(vocab_size=50, hidden_size=32)
    config.max_lag, config.n_layer = 128, 3  # as releases before wrote what they were given and did not read
    config.save_pretrained(tmp_path)
    again = HyperMLPConfig.from_pretrained(tmp_path)
    assert (again.attention, again.num_hidden_layers) == (config.attention, 12)


def test_a_saved_part_of_another_config_opens_as_it_was():
    """It says no version: transformers leaves that to the whole."""
    config = HyperMLPConfig(vocab_size=50, hidden_size=32)
    config.eos_token_ids, config.max_lag = [1, 2], 128
    part = config.to_dict()
    del part["transformers_version"]
    again = HyperMLPConfig(**part)
    assert (again.eos_token_ids, again.max_lag, again.attention) == ([1, 2], 128, config.attention)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attention": {"num_head": 2}}, "HyperConfig takes no 'num_head': did you mean num_heads"),
        ({"attention": {"num_heads": 0}}, "^num_heads must be"),
        ({"num_attention_heads": 0}, "^num_attention_heads must be"),
    ],
)
def test_heads_go_by_the_name_of_where_they_are_given(given, message):
    with pytest.raises((TypeError, ValueError), match=message):
        HyperMLPConfig(**given)


def test_attention_of_another_kind_is_an_error():
    for wrong in ("softmax", ["softmax", "softmax"], 3):
        with pytest.raises(TypeError, match="HyperConfig"):
            tiny_config(attention=wrong)
    with pytest.raises(TypeError, match="heads"):
        HyperMLPConfig(attention={"heads": 3})
