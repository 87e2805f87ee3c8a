"""The four layers: every switch runs forward and backward, says what it is, and rejects bad input."""

from __future__ import annotations

import inspect

import pytest
import torch

from hypermlp import HyperConfig, HyperGLU, HyperMLP, MixConfig, ReLUAttention, SoftmaxAttention, build_layer

LAYERS = [HyperGLU, HyperMLP, ReLUAttention, SoftmaxAttention]
HYPER_SWITCHES = {
    "no routing": {"routing_mix": False},
    "no readout": {"readout_mix": False},
    "no mixing": {"routing_mix": False, "readout_mix": False},
    "rank 0": {"mix_rank": 0},
    "no diagonal": {"routing_mix": MixConfig(4, diag=False), "readout_mix": MixConfig(4, diag=False)},
    "no identity": {"routing_mix": MixConfig(4, identity=False), "readout_mix": MixConfig(4, identity=False)},
    "by position": {"layout": "position"},
}
SWITCHES = {
    "default": {},
    "one head": {"num_heads": 1},
    "widths": {"qk_dim": 12, "v_dim": 10},
    "no convolution": {"conv_size": 0},
    "one tap": {"conv_size": 1},
    "long convolution": {"conv_size": 9},
    "no query gate": {"q_gate": False},
    "no output gate": {"output_gate": False},
    "identity gates": {"gate_activation": "identity"},
    "rotation": {"rope": True, "qk_dim": 8},
    "bias": {"bias": True},
    "window": {"max_lag": 3},
    "bidirectional": {"causal": False},
    "paper start": {"conv_init": "paper"},
}


def build(cls, **options):
    return cls(16, **({"max_lag": 12, "conv_size": 4, "q_gate": True, "output_gate": True} | options))


@pytest.mark.parametrize(
    ("cls", "options"),
    [pytest.param(cls, options, id=f"{cls.__name__} {name}") for cls in LAYERS for name, options in SWITCHES.items()]
    + [
        pytest.param(cls, options, id=f"{cls.__name__} {name}")
        for cls in LAYERS[:2]
        for name, options in (HYPER_SWITCHES | {"no norm": {"norm": False}}).items()
    ],
)
@pytest.mark.parametrize("length", [1, 7])
def test_every_switch_trains_every_parameter(cls, options, length):
    layer = build(cls, **options)
    x = torch.randn(3, length, 16, requires_grad=True)
    out = layer(x)
    assert out.shape == x.shape
    assert out.isfinite().all()
    out.square().sum().backward()
    for name, p in [("input", x), *layer.named_parameters()]:
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        if length > 1:
            assert p.grad.any(), f"{name} has no gradient"


@pytest.mark.parametrize("cls", LAYERS)
def test_a_switch_changes_what_is_computed(cls):
    x = torch.randn(2, 7, 16)
    seen = {}
    for name, options in SWITCHES.items():
        torch.manual_seed(1)
        layer = build(cls, **options)
        if layer.config.bias:  # they start at zero
            torch.nn.init.ones_(layer.v_proj.bias)
        seen[name] = layer(x)
    for name, out in seen.items():
        assert name == "default" or not torch.equal(out, seen["default"]), name


@pytest.mark.parametrize("cls", LAYERS)
def test_constructors_share_their_arguments(cls):
    hyper, mine = (inspect.signature(c).parameters for c in (HyperGLU, cls))
    missing = set(hyper) - set(mine)
    assert missing <= {"layout", "routing_mix", "readout_mix"}
    assert list(inspect.signature(cls.forward).parameters)[:3] == ["self", "hidden_states", "attention_mask"]


@pytest.mark.parametrize("mixer", ["hyperglu", "hypermlp", "relu", "softmax"])
def test_build_layer_makes_what_the_configuration_says(mixer):
    config = HyperConfig(16, mixer=mixer, max_lag=8, rope=True, bias=True, qk_dim=8, conv_size=3)
    layer = build_layer(config, layer_idx=3)
    assert layer.config == config
    assert layer.layer_idx == 3
    assert HyperConfig(**config.to_dict()) == config


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({}, "16, num_heads=2, qk_dim=4, v_dim=16, max_lag=12"),
        ({"rope": True, "qk_dim": 8}, "rope_theta=10000"),
        ({"causal": False}, "causal=False"),
        ({"layout": "position"}, "layout='position'"),
        ({"norm": False}, "norm=False"),
        ({}, "size=4, identity=True"),
        ({"gate_activation": "identity"}, "activation='identity'"),
        ({"mix_rank": 3}, "rank=3, diag=True, identity=True"),
    ],
)
def test_repr_shows_what_matters(options, shown):
    assert shown in repr(build(HyperMLP, **options))


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize(
    ("hidden_states", "kwargs", "kind", "message"),
    [
        ([1.0], {}, TypeError, "hidden_states must be a tensor, got list"),
        (torch.randn(7, 16), {}, ValueError, r"hidden_states must be \[batch, length, 16\], got \(7, 16\)"),
        (torch.randn(2, 7, 15), {}, ValueError, r"hidden_states must be .*\(2, 7, 15\)"),
        (torch.ones(2, 7, 16).long(), {}, TypeError, "hidden_states must be floating point, got torch.int64"),
        (torch.randn(2, 7, 16), {"attention_mask": torch.ones(2, 6).bool()}, ValueError, "attention_mask"),
        (torch.randn(2, 7, 16), {"attention_mask": torch.ones(2, 7)}, TypeError, "attention_mask"),
        (torch.randn(2, 7, 16), {"attention_mask": torch.full((2, 7), 3)}, ValueError, "attention_mask"),
        (torch.randn(2, 7, 16), {"cu_seqlens": torch.tensor([0, 7])}, ValueError, "cu_seqlens needs batch 1"),
        (torch.randn(1, 7, 16), {"cu_seqlens": torch.tensor([0, 8])}, ValueError, "cu_seqlens must lie within 0 and 7"),
        (torch.randn(1, 7, 16), {"cu_seqlens": torch.tensor([0, 5, 3, 7])}, ValueError, "cu_seqlens must not decrease"),
    ],
)
def test_bad_input_is_named(cls, hidden_states, kwargs, kind, message):
    with pytest.raises(kind, match=message):
        build(cls)(hidden_states, **kwargs)


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 0}, "num_heads"),
        ({"num_heads": 3, "qk_dim": 6}, "v_dim=hidden_size=16 does not divide into 3 heads"),
        ({"qk_dim": 5}, "qk_dim=5 does not divide"),
        ({"qk_dim": -4}, "qk_dim must be a positive integer"),
        ({"max_lag": 0}, "max_lag must be a positive integer"),
        ({"conv_size": -1}, "conv_size must be an integer >= 0"),
        ({"mix_rank": -1}, "mix_rank must be an integer >= 0"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"gate_activation": "tanh"}, "gate_activation must be one of"),
        ({"conv_init": "ones"}, "conv_init must be one of"),
        ({"rope": True, "qk_dim": 4, "num_heads": 4}, "score width 1 must be even|does not divide"),
    ],
)
def test_bad_options_are_named(cls, options, message):
    with pytest.raises(ValueError, match=message):
        build(cls, **options)


def test_too_long_by_position_is_named():
    with pytest.raises(ValueError, match="13 tokens does not fit position-indexed tables of 12 rows"):
        build(HyperGLU, causal=False)(torch.randn(1, 13, 16))
