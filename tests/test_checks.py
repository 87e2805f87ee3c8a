"""Numbers that no float and no size can hold are refused by every configuration, by the field's name."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from torch import nn

from hypermlp import HyperConfig, parameter_groups
from hypermlp.config import MixConfig
from hypermlp.generation.sampling import check_sampling
from hypermlp.models import LanguageModelConfig
from hypermlp_lab.bench.decoding import DecodeCase
from hypermlp_lab.bench.layers import LayerCase
from hypermlp_lab.bench.operators import OperatorCase
from hypermlp_lab.bench.run import Settings
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
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got (an integer of \d+ bits|inf|nan)"):
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
