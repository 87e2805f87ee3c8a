"""The description of a layer: labels of the paper's study, validation, round trip."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from dataclasses import FrozenInstanceError, asdict, fields, replace

import pytest

from hypermlp import HyperConfig, MixConfig, build_layer
from hypermlp.models import LanguageModelConfig
from hypermlp_lab.training import TrainingConfig

# every variant that the study plots, and those of half a width
LABELS = (
    *("S", "S-p", "S-c", "S-pc", "S-c-q", "S-c-v", "S-g-q"),
    *("R", "R-p", "R-c", "R-pc", "R-c-q", "R-c-v", "R-cg-q"),
    *("R-cg-q-12o", "R-cg-h-12o", "G-h", "R-cg-q-1o", "R-pcg-q-12o", "R-g-q-12o"),
    *("R-12o!", "R-c-12o!", "R-1o!", "R-2!", "R-2o!", "R-12!"),
    *("G-cg-q-12o", "G-cg-q-1o", "G-g-q-12o", "G-pcg-q-12o"),
    *("G-12o!", "G-c-12o!", "G-1o!", "G-cg-q", "G-2o!", "G-12!"),
)


@pytest.mark.parametrize("label", LABELS)
def test_every_label_of_the_study(label: str) -> None:
    config = HyperConfig.from_label(label, 64, max_lag=32)

    base, *fields = label.rstrip("!").split("-")
    feat = next((field for field in fields if set(field) <= set("pcg")), "")
    tmix = next((field for field in fields if field[0] in "12"), "")
    assert config.mixer == {"S": "softmax", "R": "hypermlp" if tmix else "relu", "G": "hyperglu"}[base]
    assert config.rope == ("p" in feat)
    assert config.conv_size == (4 if "c" in feat else 0)
    assert config.q_gate == config.output_gate == ("g" in feat)
    assert config.qk_dim == (16 if "q" in fields else 32 if "h" in fields else 64)
    assert config.v_dim == (16 if "v" in fields else 64)
    full = MixConfig(rank=16)
    assert config.routing_mix == (full if "1" in tmix else False)
    assert config.readout_mix == (full if "2" in tmix else False)
    assert config.layout == ("position" if tmix and not tmix.endswith("o") else "lag")
    assert config.causal
    assert build_layer(config, device="meta").config == config


@pytest.mark.parametrize(
    ("labels", "counts"),
    [
        (["S"], (16_384, 65_536, 2_359_296)),
        (["S-pc"], (16_896, 66_560, 2_365_440)),
        (["R-cg-q", "G-cg-q"], (15_952, 62_624, 2_218_944)),
        (["R-cg-q-12o"], (28_560, 87_776, 2_403_328)),
        (["G-cg-q-12o"], (34_864, 100_352, 2_495_520)),
        (["R-12!", "R-12o!"], (28_992, 90_688, 2_543_680)),
    ],
)
def test_parameters_of_the_official_layers(labels: list[str], counts: tuple[int, int, int]) -> None:
    """Counted in the authors' code at width and lags 64, 128 and 768 with 1024 lags."""
    for label in labels:
        for hidden_size, max_lag, count in zip((64, 128, 768), (64, 128, 1024), counts, strict=True):
            layer = build_layer(HyperConfig.from_label(label, hidden_size, max_lag=max_lag), device="meta")
            assert sum(p.numel() for p in layer.parameters()) == count, label


def test_defaults_are_the_papers() -> None:
    assert HyperConfig(64) == HyperConfig.from_label("G-cg-q-12o", 64)
    assert HyperConfig(64, mixer="hypermlp") == HyperConfig.from_label("R-cg-q-12o", 64)
    plain = HyperConfig.from_label("S", 64)
    assert HyperConfig(64, mixer="softmax") == plain
    assert plain.max_lag is None


def test_options_win_over_the_label() -> None:
    config = HyperConfig.from_label("G-cg-q-12o", 64, num_heads=4, qk_dim=64, conv_size=2, layout="position")
    assert (config.num_heads, config.qk_dim, config.conv_size, config.layout) == (4, 64, 2, "position")


@pytest.mark.parametrize(
    "label", ["", "X", "G-h-q", "s", "S-", "S-cp", "S-q-p", "G--q", "G-cg-q-21o", "G-o", "G-cg-q-12o!!", "G 12", 3]
)
def test_bad_labels(label: object) -> None:
    with pytest.raises(ValueError, match=re.escape(f"label {label!r} is not Base-Feat-Rank-TmixLayout")):
        HyperConfig.from_label(label, 64)


def test_softmax_has_no_mixing() -> None:
    with pytest.raises(ValueError, match=r"label 'S-c-12o': softmax has no sequence mixing"):
        HyperConfig.from_label("S-c-12o", 64)
    for mixer in ("softmax", "relu"):
        with pytest.raises(ValueError, match=f"mixer='{mixer}' has no sequence mixing"):
            HyperConfig(64, mixer=mixer, routing_mix=True)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"hidden_size": 0}, ValueError, "hidden_size must be a positive integer, got 0"),
        ({"hidden_size": 64.0}, TypeError, "hidden_size must be a positive integer, got 64.0"),
        ({"num_heads": True}, TypeError, "num_heads must be a positive integer, got True"),
        ({"mixer": "linear"}, ValueError, "mixer must be one of .* got 'linear'"),
        ({"mixer": "relu", "layout": "position"}, ValueError, "no tables to index by position"),
        ({"qk_dim": -4}, ValueError, "qk_dim must be a positive integer, got -4"),
        ({"qk_dim": 18}, ValueError, "qk_dim=18 does not divide into 4 score maps .* multiple of 4"),
        ({"qk_dim": 2, "mixer": "softmax", "num_heads": 4}, ValueError, "qk_dim=2 does not divide into 4"),
        ({"v_dim": 7}, ValueError, "v_dim=7 does not divide into 2 heads"),
        ({"hidden_size": 63}, ValueError, "v_dim=hidden_size=63 does not divide into 2 heads"),
        ({"hidden_size": 63, "mixer": "softmax"}, ValueError, "qk_dim=hidden_size=63 does not divide into 2"),
        ({"mix_rank": -1}, ValueError, "mix_rank must be an integer >= 0, got -1"),
        (
            {"mix_rank": 4, "routing_mix": MixConfig(8), "readout_mix": False},
            ValueError,
            "mix_rank=4 .* routing_mix=True",
        ),
        ({"mix_rank": True, "routing_mix": False, "readout_mix": False}, TypeError, "mix_rank must be .* got True"),
        ({"max_lag": 0}, ValueError, "max_lag must be a positive integer, got 0"),
        ({"conv_size": "4"}, TypeError, "conv_size must be an integer >= 0, got '4'"),
        ({"causal": "no"}, TypeError, "causal must be True or False, got 'no'"),
        ({"bias": 1}, TypeError, "bias must be True or False, got 1"),
        ({"causal": False, "layout": "lag"}, ValueError, "layout='lag' needs causal=True"),
        ({"layout": "offset"}, ValueError, "layout must be one of .* got 'offset'"),
        ({"gate_activation": "none"}, ValueError, "gate_activation must be one of .* got 'none'"),
        ({"conv_init": "zero"}, ValueError, "conv_init must be one of .* got 'zero'"),
        ({"eps": 0.0}, ValueError, "eps must be positive and finite, got 0.0"),
        ({"eps": float("nan")}, ValueError, "eps must be positive and finite, got nan"),
        ({"eps": float("inf")}, ValueError, "eps must be positive and finite, got inf"),
        ({"eps": 1e-46}, ValueError, "eps must be positive and finite, from 1.18e-38 to .* got 1e-46"),
        ({"eps": "x"}, TypeError, "eps must be a number, got 'x'"),
        ({"eps": True}, TypeError, "eps must be a number, got True"),
        ({"rope_theta": -1.0}, ValueError, "rope_theta must be positive and finite, got -1.0"),
        ({"rope": True, "qk_dim": 12}, ValueError, "the score width 3 must be even, .* a multiple of 8"),
        ({"mixer": "softmax", "norm": False}, ValueError, "norm=False is not for softmax"),
        ({"routing_mix": "yes"}, TypeError, "routing_mix must be True, False or a MixConfig, got 'yes'"),
        ({"readout_mix": 3}, TypeError, "readout_mix must be True, False or a MixConfig, got 3"),
        ({"routing_mix": {"rnk": 3}}, TypeError, "rnk"),
        ({"head_dim": 3}, TypeError, "head_dim"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        HyperConfig(**({"hidden_size": 64} | fields))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"rank": -1}, ValueError, "rank must be an integer >= 0, got -1"),
        ({"rank": 2.0}, TypeError, "rank must be an integer >= 0, got 2.0"),
        ({"rank": 0, "diag": False, "identity": False}, ValueError, "maps everything to zero"),
        ({"diag": 1}, TypeError, "diag must be True or False, got 1"),
    ],
)
def test_bad_mixings(fields: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MixConfig(**fields)


@pytest.mark.parametrize("label", LABELS)
def test_round_trip_through_plain_values(label: str) -> None:
    config = HyperConfig.from_label(label, 64)
    plain = json.loads(json.dumps(config.to_dict()))
    assert HyperConfig(**plain) == config
    assert plain.keys() == asdict(config).keys()


def test_round_trip_of_two_different_mixings() -> None:
    config = HyperConfig(64, routing_mix=MixConfig(3, diag=False), readout_mix=MixConfig(0, identity=False))
    assert HyperConfig(**config.to_dict()) == config


def test_a_rank_that_would_change_nothing_is_refused() -> None:
    config = HyperConfig(64, mix_rank=8)
    with pytest.raises(ValueError, match=r"mix_rank=4 changes nothing, routing_mix has rank 8, readout_mix has rank 8"):
        replace(config, mix_rank=4)
    changed = replace(config, mix_rank=4, routing_mix=True, readout_mix=True)
    assert changed == HyperConfig(64, mix_rank=4)


def test_replace_chooses_widths_anew_where_they_are_none() -> None:
    config = replace(HyperConfig(64), hidden_size=128, qk_dim=None, v_dim=None)
    assert config == HyperConfig(128)
    assert replace(config, mixer="softmax", **dict.fromkeys(MIXER_S)) == HyperConfig(128, mixer="softmax")


MIXER_S = ("qk_dim", "conv_size", "max_lag", "routing_mix", "readout_mix", "q_gate", "output_gate")
REQUIRED: dict[type, dict[str, object]] = {
    HyperConfig: {"hidden_size": 64},
    MixConfig: {},
    LanguageModelConfig: {"vocab_size": 9, "hidden_size": 64, "num_layers": 1, "attention": HyperConfig(64)},
    TrainingConfig: {"steps": 5},
}


@pytest.mark.parametrize(("cls", "name"), [(cls, field.name) for cls in REQUIRED for field in fields(cls)])
def test_none_is_a_value_that_is_documented_or_refused(cls: type, name: str) -> None:
    entry = re.search(rf"(?ms)^ {{8}}{name}: (.*?)\n(?! {{12}})", cls.__doc__ or "")
    assert entry
    documented = "None" in entry[1] or "likewise" in entry[1]
    with nullcontext() if documented else pytest.raises((TypeError, ValueError), match=rf"^{name} must be .*got None"):
        cls(**(REQUIRED[cls] | {name: None}))


def test_frozen_and_hashable() -> None:
    config = HyperConfig(64)
    with pytest.raises(FrozenInstanceError):
        config.hidden_size = 32
    with pytest.raises(FrozenInstanceError):
        config.routing_mix.rank = 1
    assert {config: 1}[HyperConfig(64)] == 1


def test_widths() -> None:
    glu, mlp = HyperConfig(64, 4), HyperConfig(64, 4, "hypermlp")
    assert (glu.num_maps, glu.qk_width, glu.v_width) == (2, 2, 16)
    assert (mlp.num_maps, mlp.qk_width, mlp.v_width) == (1, 4, 16)
