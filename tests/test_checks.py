"""What several doors refuse alike, by the argument's name: numbers that no float and no size can hold, other things
than models and tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import fields, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hypermlp import (
    HyperCache,
    HyperConfig,
    HyperGLU,
    build_layer,
    extend_max_lag,
    inspect,
    parameter_groups,
    restore_attention,
    swap_attention,
)
from hypermlp.cache import CacheSpec
from hypermlp.config import MixConfig
from hypermlp.distributed import clip_grad_norm_, full_state_dict
from hypermlp.generation import generate
from hypermlp.generation.sampling import check_sampling
from hypermlp.integrations.positions import resize_positions
from hypermlp.models import LanguageModel, LanguageModelConfig
from hypermlp_lab.bench.decoding import DecodeCase
from hypermlp_lab.bench.layers import LayerCase
from hypermlp_lab.bench.operators import OperatorCase
from hypermlp_lab.bench.settings import Settings
from hypermlp_lab.study.runs import Job, Run
from hypermlp_lab.training import TrainingConfig

_JOB = Job("text", 8, 1, 2, 16, 4, 2)
CONFIGS: list[Any] = [
    MixConfig(),
    HyperConfig(8, max_lag=16),
    LanguageModelConfig(10, 8, 1, HyperConfig(8), context_length=16),
    TrainingConfig(10),
    _JOB,
    Run(_JOB, "S", "reset", 1e-3, 0.1, 2, 0),
    OperatorCase(),
    DecodeCase(),
    Settings((LayerCase(),), memory_limit=2**30, longest_call=1.0, total_seconds=1.0),
]
FIELDS = [
    pytest.param(config, field.name, id=f"{type(config).__name__}.{field.name}")
    for config in CONFIGS
    for field in fields(config)
    if type(getattr(config, field.name)) in (int, float)
]
# the last has more digits than Python writes
WRONG = [10**400, -(10**400), float("inf"), float("nan"), 10**5000]


def test_all_kinds_are_tried() -> None:
    assert {type(config).__name__ for config, _ in (p.values for p in FIELDS)} == {type(c).__name__ for c in CONFIGS}
    assert len(FIELDS) > 60


@pytest.mark.parametrize("wrong", WRONG, ids=["1e400", "-1e400", "inf", "nan", "1e5000"])
@pytest.mark.parametrize(("config", "name"), FIELDS)
def test_what_is_no_number_of_a_machine_is_refused(config: Any, name: str, wrong: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"^{name} must be .*, got (an integer of \d+ bits|inf|nan)"):
        replace(config, **{name: wrong})


@pytest.mark.parametrize("wrong", WRONG[:1] + WRONG[2:], ids=["1e400", "inf", "nan", "1e5000"])
def test_and_by_what_takes_one_number(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"^weight_decay must be >= 0 and finite"):
        parameter_groups(nn.Linear(2, 2), weight_decay=wrong)
    with pytest.raises(ValueError, match=r"^temperature must be positive and finite"):
        check_sampling(wrong, None, None, 1.0)
    with pytest.raises(ValueError, match=r"^repetition_penalty must be positive and finite"):
        check_sampling(1.0, None, None, wrong)
    with pytest.raises(ValueError, match=r"^top_p must be above 0 and at most 1"):
        check_sampling(1.0, None, wrong, 1.0)


DOORS: list[Callable[[Any], object]] = [
    swap_attention, restore_attention, lambda x: extend_max_lag(x, 9), lambda x: resize_positions(x, 9), inspect.record,
    parameter_groups, lambda x: generate(x, torch.ones(1, 2).long(), 1), full_state_dict,
    lambda x: clip_grad_norm_(x, 1.0),
]  # fmt: skip


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("wrong", [3, None, [nn.Linear(2, 2)], nn.Linear])
def test_what_takes_a_model_says_so(door: Callable[[Any], object], wrong: object) -> None:
    with pytest.raises(TypeError, match=f"(model|module) must be a (module|LanguageModel), got {type(wrong).__name__}"):
        door(wrong)


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"hidden_size": torch.tensor(32)}, "tensor(32), which is a torch scalar: give its item()"),
        ({"hidden_size": 32, "max_lag": np.float64(4)}, "np.float64(4.0), which is a numpy scalar: give its item()"),
        ({"hidden_size": 32, "causal": torch.tensor(True)}, "tensor(True), which is a torch scalar: give its item()"),
        ({"hidden_size": 32, "causal": 1}, "1"),
        ({"hidden_size": np.True_}, "np.True_, which is a numpy scalar"),
        ({"hidden_size": 32, "rope_theta": torch.tensor(2.0)}, "tensor(2.), which is a torch scalar"),
    ],
)
def test_scalars_of_arrays_are_told_from_python_s(options: dict[str, Any], shown: str) -> None:
    """Which a config would hold, and no JSON file take."""
    with pytest.raises((TypeError, ValueError), match=re.escape(f"got {shown}")):
        HyperConfig(**options)


NUMPY_S = {int: np.int64, bool: np.bool_, float: np.float64}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_numbers_and_truths_of_numpy_are_kept_as_python_s(config: Any) -> None:
    """A config that held them could not be written as JSON, and their products run over."""
    own = {field.name: getattr(config, field.name) for field in fields(config)}
    theirs = {name: NUMPY_S[type(value)](value) for name, value in own.items() if type(value) in NUMPY_S}
    again = replace(config, **theirs)
    assert theirs
    assert again == config
    assert {name: type(getattr(again, name)) for name in theirs} == {name: type(own[name]) for name in theirs}


def test_a_fraction_that_no_float_can_be_is_refused() -> None:
    with pytest.raises(ValueError, match="rope_theta must be positive and finite"):
        HyperConfig(32, rope_theta=Fraction(10**400, 3))  # type: ignore[arg-type]


def test_a_float_of_other_precision_is_written_as_json() -> None:
    config = HyperConfig(32, eps=np.float32(0.1), rope_theta=np.float16(5))  # type: ignore[arg-type]
    assert json.loads(json.dumps(config.to_dict()))["eps"] == float(np.float32(0.1))
    assert type(config.rope_theta) is float


def test_what_takes_tokens_says_so() -> None:
    model = LanguageModel(LanguageModelConfig(10, 8, 1, HyperConfig(8, max_lag=16)))
    with pytest.raises(TypeError, match="input_ids must be a tensor, got list"):
        model([[1, 2]])
    with pytest.raises(TypeError, match="prompt_ids must be a tensor, got list"):
        generate(model, [[1, 2]], 1)  # type: ignore[arg-type]
    ids = torch.ones(1, 2).long()
    wrongs: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"pad_token_id": None}, TypeError, "pad_token_id must be an integer >= 0, got None"),
        ({"pad_token_id": -1}, ValueError, "pad_token_id must be an integer >= 0, got -1"),
        ({"seed": 10**5000}, ValueError, "seed must be an integer that fits into 64 bits, got an integer of"),
    ]
    for wrong, error, message in wrongs:
        with pytest.raises(error, match=message):
            generate(model, ids, 1, stop=[[1]], **wrong)


def test_what_takes_a_config_or_a_part_of_this_library_says_so() -> None:
    layer: Any = HyperGLU(8, max_lag=16, layer_idx=0)
    model = LanguageModel(LanguageModelConfig(10, 8, 1, layer.config))
    x, ids, cache = torch.randn(1, 3, 8), torch.ones(1, 2).long(), HyperCache()
    with torch.no_grad():
        layer(x, cache=cache)
    wrong: Any = "e"
    doors: list[tuple[Callable[[], object], str]] = [
        (lambda: build_layer(wrong), "config must be a HyperConfig, got str"),
        (lambda: LanguageModel(wrong), "config must be a LanguageModelConfig, got str"),
        (lambda: CacheSpec.of(layer), "config must be a HyperConfig, got HyperGLU: a layer has it as layer.config"),
        (lambda: cache.load_state_dict(cache.state_dict(), {0: layer.config}), "specs must be a CacheSpec of each"),
        (lambda: cache.load_state_dict(cache.state_dict(), layer), "specs must be a CacheSpec of each"),
        (lambda: layer(x, cache=[]), "cache must be a HyperCache, got list"),
        (lambda: inspect.head_maps(layer), "call must be a LayerCall, got HyperGLU"),
        (lambda: generate(layer, ids, 1), "model must be a LanguageModel, got HyperGLU"),
        (lambda: generate(model, ids, 1, attention_mask=[[1, 1]]), "attention_mask must be a tensor, got list"),
        (lambda: generate(model, ids, 1, stop=wrong), "stop must be sequences of tokens, got the text 'e'"),
        (lambda: generate(model, ids, 1, stop=["ab"]), "stop must be sequences of tokens, got the text 'ab'"),
    ]
    for door, message in doors:
        with pytest.raises(TypeError, match=re.escape(message)):
            door()


def test_a_compiled_model_generates() -> None:
    model = LanguageModel(LanguageModelConfig(10, 8, 1, HyperConfig(8, max_lag=16)))
    ids = torch.ones(1, 2).long()
    compiled: Any = torch.compile(model, backend="eager")
    assert torch.equal(generate(compiled, ids, 3, temperature=0.0), generate(model, ids, 3, temperature=0.0))
