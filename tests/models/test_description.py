"""``LanguageModel.config``: read from the layers, set, and of older pickles."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch

from hypermlp import HyperConfig
from hypermlp.generation import generate
from hypermlp.layers import build_layer
from hypermlp.models import LanguageModel, LanguageModelConfig, extend_max_lag

OLD, NEW, HIDDEN = 8, 19, 16


def described_model():
    return LanguageModel(LanguageModelConfig(11, HIDDEN, 2, HyperConfig(HIDDEN, max_lag=OLD), context_length=OLD))


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["softmax", "hyperglu"])
def test_a_layer_of_another_window_leaves_the_description(mixer):
    """Only tables of the model's own kind are described one by one."""
    model = LanguageModel(LanguageModelConfig(11, HIDDEN, 2, HyperConfig(HIDDEN, mixer=mixer, max_lag=OLD)))
    config, tokens = model.config, torch.randint(11, (1, OLD))
    other = {"max_lag": 4} if mixer == "softmax" else {"max_lag": 32, "layout": "position"}
    model.blocks[1].attention = build_layer(HyperConfig(HIDDEN, mixer=mixer, **other), layer_idx=1)
    assert model.config == config
    assert generate(model, tokens, 3, seed=0).shape == (1, OLD + 3)


def test_a_models_config_can_be_set():
    model = described_model()
    model.config = replace(model.config, context_length=100)
    assert model.config.context_length == 100
    extend_max_lag(model, NEW)
    assert (model.config.context_length, model.config.attention.max_lag) == (100, NEW)
    with pytest.raises(TypeError, match="config must be a LanguageModelConfig, got dict"):
        model.config = model.config.to_dict()


@torch.no_grad()
def test_a_pickle_of_before_config_was_a_property():
    model, tokens = described_model(), torch.randint(11, (1, OLD))
    older = copy.deepcopy(model)
    older.__dict__["config"] = older.__dict__.pop("_config")
    again = pickle.loads(pickle.dumps(older))
    assert torch.equal(again(tokens), model(tokens))
    assert again.config == model.config
    assert vars(again).keys() == vars(model).keys()


def test_a_description_without_lags_of_layers_is_what_it_was_before_there_were_any():
    model = described_model()
    fields = ["attention", "context_length", "hidden_size", "intermediate_size", "norm_eps", "num_layers"]
    assert sorted(model.config.to_dict()) == [*fields, "tie_embeddings", "vocab_size"]
    extend_max_lag(model.blocks[1], NEW)
    assert model.config.to_dict()["max_lags"] == (OLD, NEW)
