"""Closed-form counts against real modules, and the widths chosen from them."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hypermlp import HyperConfig, MixConfig, build_layer
from hypermlp.budget import (
    count_block_flops,
    count_block_parameters,
    count_flops,
    count_parameters,
    match_intermediate_size,
    match_parameters,
)

MIXES = st.one_of(
    st.booleans(),
    st.builds(MixConfig, rank=st.integers(1, 5), diag=st.booleans(), identity=st.booleans()),
    st.builds(MixConfig, rank=st.just(0), diag=st.just(True), identity=st.booleans()),
)


@st.composite
def configs(draw: st.DrawFn) -> HyperConfig:
    """Any layer, small."""
    mixer = draw(st.sampled_from(["hyperglu", "hypermlp", "relu", "softmax"]))
    hyper = mixer in ("hyperglu", "hypermlp")
    heads, maps = draw(st.integers(1, 3)), 2 if mixer == "hyperglu" else 1
    causal = draw(st.booleans())
    return HyperConfig(
        hidden_size=draw(st.integers(1, 24)),
        num_heads=heads,
        mixer=mixer,
        qk_dim=2 * heads * maps * draw(st.integers(1, 4)),
        v_dim=heads * draw(st.integers(1, 7)),
        max_lag=draw(st.integers(1, 40)) if hyper else draw(st.none() | st.integers(1, 40)),
        conv_size=draw(st.integers(0, 5)),
        causal=causal,
        layout=draw(st.sampled_from(["lag", "position"])) if causal and hyper else None,
        routing_mix=draw(MIXES) if hyper else None,
        readout_mix=draw(MIXES) if hyper else None,
        q_gate=draw(st.booleans()),
        output_gate=draw(st.booleans()),
        rope=draw(st.booleans()),
        bias=draw(st.booleans()),
    )


def num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@settings(max_examples=100, deadline=None)
@given(configs())
def test_parameters_are_those_of_the_real_layer(config: HyperConfig) -> None:
    layer = build_layer(config, device="meta")
    count = count_parameters(config)
    assert count.total == num_parameters(layer)
    parts = dict.fromkeys(("projections", "convolutions", "gates", "mixing", "attention"), 0)
    for name, p in layer.named_parameters():
        kind = name.split(".")[0].split("_")[-1]
        parts[{"proj": "projections", "conv": "convolutions", "gate": "gates", "mix": "mixing"}[kind]] += p.numel()
    assert {name: getattr(count, name) for name in parts} == parts


@settings(max_examples=40, deadline=None)
@given(configs(), st.integers(1, 3), st.integers(1, 60))
def test_flops_are_those_pytorch_counts(config: HyperConfig, batch: int, length: int) -> None:
    """All but two terms: it leaves out the convolutions, and takes softmax's whole square.

    It does not know the fused softmax kernel of the CPU, so that one takes its plain form.
    """
    if config.layout == "position" and config.max_lag is not None:
        length = min(length, config.max_lag)
    layer = build_layer(config, backend="chunked")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(torch.randn(batch, length, config.hidden_size))

    count = count_flops(config, batch, length)
    attention = count.attention
    if config.mixer == "softmax":
        attention = batch * length**2 * 2 * (config.qk_dim + config.v_dim)
        assert count.attention <= attention
    assert counter.get_total_flops() == count.total - count.convolutions - count.attention + attention
    assert count.convolutions == 4 * batch * length * config.hidden_size * config.conv_size


def test_flops_by_hand() -> None:
    """One head of width 3 and 5 over 4 tokens, rank 2, 10 visible pairs, nothing else."""
    config = HyperConfig(
        7, 1, "hypermlp", qk_dim=3, v_dim=5, mix_rank=2, max_lag=8, conv_size=2, q_gate=False, readout_mix=False
    )
    count = count_flops(config, 1, 4)
    assert count.projections == 2 * 4 * 7 * (3 + 3 + 5 + 5)
    assert count.gates == 2 * 4 * 7 * (5 + 2)
    assert count.convolutions == 2 * (2 * 4 * 7 * 2)
    assert count.mixing == 10 * 2 * (2 * 2)
    assert count.attention == 10 * 2 * (3 + 5)
    assert count_flops(config, 3, 4).total == 3 * count.total


def test_a_window_makes_cost_linear_and_half_a_square_otherwise() -> None:
    config = HyperConfig(32, max_lag=16)
    growth = count_flops(config, 1, 4096).attention - count_flops(config, 1, 2048).attention
    assert growth == 2048 * 16 * 2 * (config.qk_dim + config.v_dim)
    softmax = HyperConfig(32, mixer="softmax")
    assert count_flops(softmax, 1, 10).attention == 55 * 2 * (32 + 32)
    assert count_flops(replace(softmax, causal=False, layout="position"), 1, 10).attention == 100 * 2 * (32 + 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((0, 4), "batch_size must be a positive integer, got 0"),
        ((1, 0), "length must be a positive integer, got 0"),
        ((2.5, 4), "batch_size must be a positive integer, got 2.5"),
        ((1, True), "length must be a positive integer"),
    ],
)
def test_flop_errors(options: tuple[int, int], message: str) -> None:
    error = ValueError if 0 in options else TypeError
    with pytest.raises(error, match=message):
        count_flops(HyperConfig(16), *options)


def test_flops_of_a_length_the_layer_refuses() -> None:
    config = HyperConfig(16, max_lag=4, causal=False)
    with pytest.raises(ValueError, match="length=5 is over max_lag=4"):
        count_flops(config, 1, 5)
    with pytest.raises(ValueError, match="max_lag"):
        build_layer(config)(torch.randn(1, 5, 16))


GLU = HyperConfig(128, max_lag=128)
SOFTMAX = HyperConfig(128, mixer="softmax")
SOFTMAX_PC = HyperConfig.from_label("S-pc", 128)


def test_the_default_is_larger_than_softmax() -> None:
    assert count_parameters(GLU).total == 100_352
    assert count_parameters(SOFTMAX).total == 65_536


class TestMatchParameters:
    def test_widen_softmax(self) -> None:
        match = match_parameters(GLU, SOFTMAX, how="widen")
        assert match.config == replace(SOFTMAX, qk_dim=196, v_dim=196)
        assert match.reference == GLU
        assert match.count == match.reference_count == num_parameters(build_layer(match.config)) == 100_352
        assert str(match) == (
            "softmax layer with qk_dim 128 -> 196, v_dim 128 -> 196: "
            "100,352 parameters against 100,352 of hyperglu (+0.00 %)"
        )

    def test_narrowing_takes_from_qk_dim_alone_where_that_is_enough(self) -> None:
        """The paper's way, at the paper's width."""
        softmax, glu = HyperConfig(768, mixer="softmax"), HyperConfig(768, max_lag=1024)
        match = match_parameters(softmax, glu, how="narrow")
        assert match.config == replace(glu, qk_dim=132)
        assert match.count == 2_357_220

    def test_narrowing_takes_from_the_rank_last_and_least(self) -> None:
        match = match_parameters(SOFTMAX, GLU, how="narrow")
        assert match.config.qk_dim == 20
        assert match.config.mix_rank == match.config.routing_mix.rank == match.config.readout_mix.rank == 3
        assert "qk_dim 32 -> 20, mix_rank 16 -> 3" in str(match)
        assert build_layer(match.config)(torch.randn(1, 5, 128)).shape == (1, 5, 128)
        # with one rank more, no qk_dim fits
        rank4 = MixConfig(rank=4)
        for qk_dim in range(16, 33, 4):
            other = count_parameters(replace(GLU, qk_dim=qk_dim, routing_mix=rank4, readout_mix=rank4)).total
            assert abs(other / 65_536 - 1) > 0.01

    def test_narrower_score_maps_can_be_allowed(self) -> None:
        match = match_parameters(SOFTMAX, GLU, how="narrow", min_qk_width=1)
        assert match.config.qk_dim == 8
        assert match.config.mix_rank == 5

    def test_each_mixing_keeps_its_own_switches(self) -> None:
        glu = replace(GLU, routing_mix=MixConfig(16, diag=False), readout_mix=MixConfig(2, identity=False))
        match = match_parameters(SOFTMAX, glu, how="narrow")
        assert match.config.routing_mix.rank < 16
        assert not match.config.routing_mix.diag
        assert match.config.readout_mix == MixConfig(2, identity=False)

    def test_what_fits_is_left_alone(self) -> None:
        match = match_parameters(SOFTMAX, SOFTMAX_PC, how="widen", tolerance=0.02)
        assert match.config == SOFTMAX_PC
        assert "nothing changed" in str(match)

    def test_nothing_fits(self) -> None:
        softmax, glu = HyperConfig(32, mixer="softmax"), HyperConfig(32, max_lag=128)
        with pytest.raises(ValueError, match=r"no width of hyperglu is within 1 % of 4,096 .* closest is 6,638 \(\+62"):
            match_parameters(softmax, glu, how="narrow")
        with pytest.raises(ValueError, match=r"closest is 65,536 .* nothing changed; .* how='narrow'"):
            match_parameters(HyperConfig(64, mixer="softmax"), SOFTMAX, how="widen")
        with pytest.raises(ValueError, match="closest is"):
            match_parameters(GLU, SOFTMAX_PC, how="widen", tolerance=1e-6)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"how": "stretch"}, "how must be 'widen' or 'narrow', got 'stretch'"),
            ({"how": "widen", "tolerance": -1.0}, "tolerance must be positive"),
            ({"how": "narrow", "min_qk_width": 0}, "min_qk_width must be a positive integer"),
        ],
    )
    def test_bad_arguments(self, options: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            match_parameters(GLU, SOFTMAX, **options)

    def test_frozen(self) -> None:
        with pytest.raises(FrozenInstanceError):
            match_parameters(GLU, SOFTMAX, how="widen").count = 0

    @settings(max_examples=40, deadline=None)
    @given(
        st.integers(2, 24).map(lambda n: 16 * n), st.integers(8, 512), st.sampled_from(["S", "S-pc", "R-c", "S-c-q"])
    )
    def test_widened_layers_can_be_built_and_fit(self, hidden_size: int, max_lag: int, label: str) -> None:
        glu, other = HyperConfig(hidden_size, max_lag=max_lag), HyperConfig.from_label(label, hidden_size)
        target = count_parameters(glu).total
        if count_parameters(other).total > target:
            return
        match = match_parameters(glu, other, how="widen", tolerance=0.02)
        parameters = num_parameters(build_layer(match.config, device="meta"))
        assert parameters == match.count
        assert abs(parameters - target) <= 0.02 * target
        assert match.config.v_dim >= other.v_dim
        assert match.config.qk_dim >= other.qk_dim


class Block(nn.Module):
    """What ``count_block_parameters`` says it counts."""

    def __init__(self, config: HyperConfig, intermediate_size: int) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.attention = build_layer(config, device="meta")
        self.norms = nn.ModuleList(nn.RMSNorm(hidden, device="meta") for _ in range(2))
        self.gate_up = nn.Linear(hidden, 2 * intermediate_size, bias=False, device="meta")
        self.down = nn.Linear(intermediate_size, hidden, bias=False, device="meta")


class TestMatchIntermediateSize:
    def test_widened_softmax_block(self) -> None:
        match = match_intermediate_size(GLU, SOFTMAX_PC, 352)
        assert match.intermediate_size == 440
        assert match.config == SOFTMAX_PC
        assert num_parameters(Block(GLU, 352)) == match.reference_count == count_block_parameters(GLU, 352)
        assert num_parameters(Block(SOFTMAX_PC, 440)) == match.count
        assert match.relative_difference == 0
        assert str(match) == (
            "softmax block with intermediate_size 352 -> 440: 235,776 parameters against 235,776 of hyperglu (+0.00 %)"
        )

    @settings(max_examples=40, deadline=None)
    @given(st.integers(2, 32).map(lambda n: 16 * n), st.integers(8, 2048), st.sampled_from(["S", "S-pc", "R-pc"]))
    def test_always_as_close_as_can_be(self, hidden_size: int, max_lag: int, label: str) -> None:
        glu, other = HyperConfig(hidden_size, max_lag=max_lag), HyperConfig.from_label(label, hidden_size)
        match = match_intermediate_size(glu, other, 3 * hidden_size)
        assert abs(match.relative_difference) <= 0.01
        assert abs(match.count - match.reference_count) <= 3 * hidden_size / 2

    @pytest.mark.parametrize("length", [64, 300])
    def test_equal_flops(self, length: int) -> None:
        match = match_intermediate_size(GLU, SOFTMAX_PC, 352, flops_at=length)
        assert match.unit == "FLOPs"
        assert match.reference_count == count_block_flops(GLU, 352, 1, length)
        assert abs(match.relative_difference) <= 0.01
        x = torch.randn(1, length, GLU.hidden_size, device="meta")
        for config, width, count in (
            (GLU, 352, match.reference_count),
            (SOFTMAX_PC, match.intermediate_size, match.count),
        ):
            assert width is not None
            block = Block(config, width)
            with FlopCounterMode(display=False) as counter:
                block.gate_up(x)
                block.down(x.new_empty(1, length, width))
            assert counter.get_total_flops() + count_flops(config, 1, length).total == count
        by_parameters = match_intermediate_size(GLU, SOFTMAX_PC, 352).intermediate_size
        assert by_parameters != match.intermediate_size
        assert "FLOPs against" in str(match)

    def test_multiples(self) -> None:
        match = match_intermediate_size(GLU, SOFTMAX, 352, multiple_of=64, tolerance=0.05)
        assert match.intermediate_size == 448

    def test_nothing_fits(self) -> None:
        with pytest.raises(ValueError, match=r"multiples of 256, .* within 1 % of .* closest is .* with 512"):
            match_intermediate_size(GLU, SOFTMAX, 352, multiple_of=256)
        with pytest.raises(ValueError, match=r"closest is .* with 1;"):
            match_intermediate_size(HyperConfig(16, max_lag=8, mix_rank=1), SOFTMAX, 8)
        with pytest.raises(ValueError, match="intermediate_size must be a positive integer, got 0"):
            match_intermediate_size(GLU, SOFTMAX, 0)
