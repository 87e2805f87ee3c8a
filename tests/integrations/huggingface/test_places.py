"""A layer's place in a cache: layers taken out and numbered anew, and no place used twice in one step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from hypermlp.integrations.huggingface import from_pretrained
from hypermlp.integrations.huggingface.names import CACHE_NAME
from tests.integrations.huggingface import checks
from tests.integrations.huggingface.hosts import cache_of, logits, swapped, tokens


def pruned(keep: tuple[int, ...] = (0, 2, 3), *, renumber: bool = True) -> Any:
    """A model of four layers, of which some have been taken out after its swap."""
    model: Any = swapped("llama", num_hidden_layers=4)
    model.model.layers = nn.ModuleList(model.model.layers[place] for place in keep)
    model.config.num_hidden_layers = len(keep)
    if renumber:
        for place, layer in enumerate(model.model.layers):
            layer.self_attn.layer_idx = place
    return model


def test_layers_taken_out_and_numbered_anew() -> None:
    model = pruned()
    assert [layer.mixer.layer_idx for layer in checks.attentions(model)] == [0, 1, 2]
    checks.check_stepwise(model)
    for kind in ("greedy", "beam", "static", "chunked prefill"):
        checks.check_generate(model, kind)
    checks.check_generate_padded(model)
    checks.check_generate_padded(model, num_beams=3)
    cache = cache_of(model)
    first = checks.generate(model, tokens(2, 5), new_tokens=4, **{CACHE_NAME: cache})
    longer = torch.cat((first, tokens(2, 3, seed=5)), dim=1)
    expected = checks.generate(model, longer, use_cache=False)
    assert torch.equal(checks.generate(model, longer, **{CACHE_NAME: cache}), expected)


def test_a_pruned_model_is_saved_as_it_stands(tmp_path: Path) -> None:
    model = pruned()
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path).eval()
    assert checks.error(logits(again, tokens(2, 9)), logits(model, tokens(2, 9))) < checks.TOLERANCE
    checks.check_generate_padded(again)


def test_layers_that_were_not_numbered_anew_are_told_to() -> None:
    with pytest.raises(ValueError, match="layer_idx=3: where layers were taken out"):
        checks.check_stepwise(pruned(renumber=False))


def shared(how: str) -> Any:
    """A model of three layers with one attention at two depths."""
    model: Any = swapped("llama", num_hidden_layers=3)
    first, second, third = model.model.layers
    if how == "beside":
        second.self_attn = first.self_attn
    elif how == "last":
        third.self_attn = second.self_attn
    elif how == "apart":
        third.self_attn = first.self_attn
    elif how == "everywhere":
        second.self_attn = third.self_attn = first.self_attn
    else:
        third.self_attn = copy.deepcopy(second.self_attn)
    return model


@pytest.mark.parametrize("static", [None, 32])
@pytest.mark.parametrize("how", ["beside", "last", "apart", "everywhere", "copied"])
def test_a_second_use_in_one_step_is_an_error(how: str, static: int | None) -> None:
    model = shared(how)
    assert logits(model, tokens(2, 6), use_cache=False).isfinite().all()
    cache = cache_of(model, static=static)
    with pytest.raises(ValueError, match="a second time in one step"):
        logits(model, tokens(2, 6), use_cache=True, **{CACHE_NAME: cache})


@pytest.mark.parametrize("static", [None, 32])
@pytest.mark.parametrize("layers", [[0], [1], [2], [0, 2]])
def test_layers_beside_those_of_the_host_are_used_once(layers: list[int], static: int | None) -> None:
    model: Any = swapped("llama", num_hidden_layers=3, layers=layers)
    cache = transformers.DynamicCache() if static is None else cache_of(model, static=static)
    checks.check_stepwise(model, sizes=(4, 1, 1, 3, 1), cache=cache)
