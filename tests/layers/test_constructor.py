"""One constructor for every layer: its keywords are the config's fields, typed and told of in one place."""

from __future__ import annotations

import dataclasses
import inspect
import pydoc

import pytest

from hypermlp import HyperConfig, HyperGLU, HyperMLP, ReLUAttention, SoftmaxAttention, build_layer
from hypermlp.config import HyperFields
from hypermlp.layers import AttentionLayer

LAYERS = [HyperGLU, HyperMLP, ReLUAttention, SoftmaxAttention]
FIELDS = {field.name for field in dataclasses.fields(HyperConfig)} - {"hidden_size", "num_heads", "mixer"}


def test_keywords_are_the_fields_of_the_config() -> None:
    assert set(HyperFields.__annotations__) == FIELDS


def test_keywords_of_the_config_are_seen_by_older_tools() -> None:
    own = inspect.getfullargspec(HyperConfig)
    assert own.args == ["self", *(field.name for field in dataclasses.fields(HyperConfig))]
    assert own.varkw is None


@pytest.mark.parametrize("layer", LAYERS)
def test_help_tells_what_each_keyword_means(layer: type[AttentionLayer]) -> None:
    text = pydoc.plain(pydoc.render_doc(layer))
    for name in FIELDS | {"hidden_size", "num_heads", "backend", "layer_idx"}:
        assert f"{name}: " in text or f"{name}," in text, name


@pytest.mark.parametrize("layer", LAYERS)
def test_an_unknown_keyword_is_refused(layer: type[AttentionLayer]) -> None:
    with pytest.raises(TypeError, match="max_lags"):
        layer(16, max_lags=8)
    with pytest.raises(TypeError, match="mixer"):
        layer(16, mixer="softmax")


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_is_what_its_config_says(layer: type[AttentionLayer]) -> None:
    made = layer(16, 2, bias=True, conv_size=3, max_lag=8)
    assert made.config == HyperConfig(16, 2, layer.mixer, bias=True, conv_size=3, max_lag=8)
    again = build_layer(made.config, layer_idx=3)
    assert type(again) is layer
    assert again.config == made.config
    assert again.layer_idx == 3
    assert again.state_dict().keys() == made.state_dict().keys()


@pytest.mark.parametrize("layer", LAYERS)
def test_a_backend_that_there_is_not_is_refused_where_it_is_said(layer: type[AttentionLayer]) -> None:
    with pytest.raises(ValueError, match=r"^backend must be one of .*'chunked'.*, got 'flash'$"):
        layer(16, max_lag=8, backend="flash")  # type: ignore[arg-type]
