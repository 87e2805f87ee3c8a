"""The authors' recorded cases against ours, and the importer's errors."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hypermlp import HyperGLU, HyperMLP, build_layer
from hypermlp.integrations.official import convert_official, from_official, official_config
from hypermlp.layers.rotary import rotate
from tests import golden

BACKENDS = ("reference", "chunked")
DELIBERATE = ("s11", "s24", "s25", "s26")
REPRODUCED = [name for name in golden.names("s") if not name.startswith(DELIBERATE)]


def run(layer: HyperMLP, x: Tensor, w: Tensor, mask: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and gradients of ``(y * w).sum()`` by our names and ``"x"``."""
    layer.zero_grad()
    x = x.to(layer.q_proj.weight.dtype, copy=True).requires_grad_()
    y = layer(x, mask)
    (y * w.to(y.dtype)).sum().backward()
    return y.detach(), {"x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert golden.relative_error(actual.detach(), expected.detach()) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", REPRODUCED)
def test_outputs_and_every_gradient(name: str, backend: str, dtype: torch.dtype) -> None:
    case = golden.load(name)
    y, grads = run(case.layer(dtype, backend=backend), case.x, case.w)

    assert y.dtype == dtype
    assert_same(y, case.y[dtype], golden.TOLERANCE_Y[dtype])
    expected = {"x": case.grad_x, **case.our_grads()}
    assert grads.keys() == expected.keys()
    for parameter, grad in grads.items():
        assert golden.relative_error(grad, expected[parameter]) <= golden.TOLERANCE_GRAD[dtype], parameter


def test_every_case_is_used() -> None:
    assert len(REPRODUCED) + len(DELIBERATE) + len(golden.names("q")) == len(golden.names()) == 29


def test_the_comparison_can_fail() -> None:
    """Tables left as they are stored, lag 0 last, give something else altogether."""
    case = golden.load("s01")
    layer = case.layer()
    with torch.no_grad():
        layer.routing_mix.down.copy_(layer.routing_mix.down.flip(1))
    y, _ = run(layer, case.x, case.w)
    assert golden.relative_error(y, case.y[torch.float64]) > 1e-2


class TestDeliberateDifferences:
    def test_s11_rotation_of_wider_maps_is_refused(self) -> None:
        case = golden.load("s11")
        with pytest.raises(ValueError, match=r"use_rope=True with score width 4.*no rotation"):
            case.layer()

    def test_s11_theirs_is_not_the_rotation_and_ours_is(self) -> None:
        case = golden.load("s11")
        config = replace(official_config(case.config | {"use_rope": False}), rope=True)
        layer = build_layer(config, dtype=torch.float64, backend="reference")
        layer.load_state_dict({k: v.double() for k, v in convert_official(config, case.params).items()})
        y, _ = run(layer, case.x, case.w)
        assert golden.relative_error(y, case.y[torch.float64]) > 1e-2

        pair = torch.randn(2, 1, 1, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        q, k = (rotate(x.expand(1, 32, 1, 4), 10000.0)[0, :, 0] for x in pair)
        assert torch.allclose(q.norm(dim=-1), pair[0].norm(), rtol=1e-12)
        for lag in (0, 1, 7):
            scores = (q[lag:] * k[: 32 - lag]).sum(-1)
            assert torch.allclose(scores, scores[0].expand_as(scores), rtol=1e-12)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_s24_position_tables_stay_where_they_are(self, backend: str) -> None:
        case = golden.load("s24")
        layer, y64 = case.layer(backend=backend), case.y[torch.float64]
        y, _ = run(layer, case.x, case.w)
        for length in (1, 8, 20):
            prefix, _ = run(layer, case.x[:, :length], case.w[:, :length])
            assert_same(prefix, y[:, :length])
        assert golden.relative_error(y[:, :1], y64[:, :1]) > 1e-2

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_s24_is_ours_once_the_tables_have_been_moved(self, backend: str) -> None:
        """Nothing but the place of the tables differs: their last T rows as our first, and all is equal."""
        case = golden.load("s24")
        length = case.x.shape[1]
        last_rows = {"op.mix.U": 1, "op.mix.d": 1, "op.mix.Vt": 2, "op2.mix.U": 1, "op2.mix.d": 1, "op2.mix.Vt": 2}

        def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {
                name: x.narrow(last_rows[name], x.shape[last_rows[name]] - length, length) if name in last_rows else x
                for name, x in tensors.items()
            }

        config = case.config | {"block_size": length}
        layer = from_official(config, {k: v.double() for k, v in moved(case.params).items()}, backend=backend)
        y, grads = run(layer, case.x, case.w)
        assert_same(y, case.y[torch.float64], 1e-10)
        for name, expected in convert_official(layer.config, moved(case.grads)).items():
            assert golden.relative_error(grads[name], expected) <= 1e-10, name

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_s25_right_padding(self, backend: str) -> None:
        case = golden.load("s25")
        mask, y64 = case.attention_mask, case.y[torch.float64]
        y, grads = run(case.layer(backend=backend), case.x, case.w, mask)
        assert_same(y[mask], y64[mask], 1e-10)
        assert (y[~mask] == 0).all()
        assert y64[~mask].abs().max() > 0.1
        self.assert_like_alone(case, backend, y, grads)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_s26_left_padding(self, backend: str) -> None:
        case = golden.load("s26")
        mask, y64 = case.attention_mask, case.y[torch.float64]
        y, grads = run(case.layer(backend=backend), case.x, case.w, mask)
        assert (y[~mask] == 0).all()
        self.assert_like_alone(case, backend, y, grads)
        assert golden.relative_error(y[mask], y64[mask]) > 0.1

    @staticmethod
    def assert_like_alone(case: golden.Golden, backend: str, y: Tensor, grads: dict[str, Tensor]) -> None:
        """Outputs and gradients are those of each sequence run without its padding."""
        total: dict[str, Tensor] = {}
        layer = case.layer(backend=backend)
        for row, valid in enumerate(case.attention_mask):
            alone, alone_grads = run(layer, case.x[row : row + 1, valid], case.w[row : row + 1, valid])
            assert_same(y[row, valid], alone[0])
            assert_same(grads["x"][row, valid], alone_grads.pop("x")[0])
            for name, grad in alone_grads.items():
                total[name] = total.get(name, 0) + grad
        for name, grad in total.items():
            assert golden.relative_error(grads[name], grad) <= 1e-12, name

    @pytest.mark.parametrize(
        ("name", "message", "masked"),
        [
            ("q01", "op1_do_masking=False", {"op1_do_masking": True}),
            ("q02", "do_masking=False with aligner_kind='offset'", {"do_masking": True}),
            ("q03", "op2_do_masking=False with aligner_kind='identity'", {"op2_do_masking": True}),
        ],
    )
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_leaking_options_are_refused(self, name: str, message: str, masked: dict[str, bool], backend: str) -> None:
        case = golden.load(name)
        with pytest.raises(ValueError, match=f"^{message} is not taken over"):
            case.layer()

        # with the masking on, ours is causal and consistent, and not what they recorded
        layer = from_official(case.config | masked, {k: v.double() for k, v in case.params.items()}, backend=backend)
        y, _ = run(layer, case.x, case.w)
        prefix, _ = run(layer, case.x[:, :9], case.w[:, :9])
        assert_same(prefix, y[:, :9])
        assert golden.relative_error(y, case.y[torch.float64]) > 1e-2


class TestImporter:
    def test_class_and_description(self) -> None:
        layer = golden.load("s01").layer(torch.float32, backend="chunked", layer_idx=3)
        assert type(layer) is HyperGLU
        assert layer.layer_idx == 3
        assert layer.backend == "chunked"
        assert layer.config.max_lag == 32
        assert layer.config.routing_mix.rank == 16
        assert type(golden.load("s05").layer()) is HyperMLP

    def test_ranks_of_the_two_mixings_are_separate(self) -> None:
        config = golden.load("s21").hyper_config()
        assert (config.routing_mix.rank, config.readout_mix.rank) == (1, 4)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_dtype_and_device_of_the_state_dict(self, dtype: torch.dtype) -> None:
        layer = golden.load("s01").layer(dtype)
        assert {(p.dtype, p.device.type, p.requires_grad) for p in layer.parameters()} == {(dtype, "cpu", True)}

    def test_parameters_are_copies_that_can_be_saved_and_loaded(self) -> None:
        case = golden.load("s01")
        layer = case.layer(torch.float32)
        given = {name: p.clone() for name, p in case.params.items()}
        with torch.no_grad():
            for parameter in layer.parameters():
                assert parameter.is_contiguous()
                parameter.zero_()
        assert all(torch.equal(p, given[name]) for name, p in case.params.items())
        fresh = build_layer(case.hyper_config())
        layer.load_state_dict(fresh.state_dict())

    def test_fields_left_out_take_the_authors_defaults(self) -> None:
        case = golden.load("s01")
        few = {name: case.config[name] for name in ("n_embd", "n_head", "block_size")}
        assert official_config(few) == official_config(case.config)
        assert official_config(few | {"qk_rank": None, "vo_rank": None}) == official_config(few)

    def test_both_names_of_the_norm_are_one_function(self) -> None:
        case = golden.load("s03")
        assert case.config["attn_norm"] == "l2"
        assert official_config(case.config | {"attn_norm": "out_scale"}) == case.hyper_config()
        assert not official_config(case.config | {"attn_norm": "none"}).norm

    def test_linear_gates(self) -> None:
        """gate_act="none": no recorded case, so against the definition, by sigmoid gates of the same value."""
        case = golden.load("s01")
        gates = ("left_gate", "right_gate", "control1", "control2")
        constant = {
            name: torch.zeros_like(p) if name.startswith(gates) else p.double() for name, p in case.params.items()
        }
        linear = {name: p + 0.5 if name.startswith(gates) and "bias" in name else p for name, p in constant.items()}
        sigmoid = from_official(case.config, {k: v.double() for k, v in constant.items()})
        identity = from_official(case.config | {"gate_act": "none"}, {k: v.double() for k, v in linear.items()})
        assert_same(identity(case.x.double()), sigmoid(case.x.double()))

    @pytest.mark.parametrize("op", ["op1", "op2"])
    def test_masking_that_changes_nothing_is_taken(self, op: str) -> None:
        bidirectional = golden.load("s22")
        assert official_config(bidirectional.config | {f"{op}_do_masking": False}) == bidirectional.hyper_config()
        without = golden.load("s13" if op == "op1" else "s14")
        assert official_config(without.config | {f"{op}_do_masking": False}) == without.hyper_config()
        assert official_config(golden.load("s01").config | {"op2_do_masking": False}).layout == "lag"

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"attn_kind": "softmax"}, "attn_kind must be one of .*'softmax'"),
            ({"attn_norm": "l1"}, "attn_norm must be one of .*'l1'"),
            ({"gate_act": "tanh"}, "gate_act must be one of .*'tanh'"),
            ({"aligner_kind": ["offset"]}, "aligner_kind must be one of"),
            ({"op1_per_head": False}, "op1_per_head=False is not taken over"),
            ({"op2_per_head": False}, "op2_per_head=False is not taken over"),
            ({"op1_do_masking": False, "aligner_kind": "identity"}, "op1_do_masking=False is not taken over"),
            ({"op2_rank": 0}, "op2_rank must be a positive integer, got 0"),
            ({"use_swiglu": True}, r"unknown config fields \['use_swiglu'\]: from_official knows"),
            ({"n_heads": 2}, r"unknown config fields \['n_heads'\]: did you mean n_head\?"),
            ({"qk_rank": 7}, "qk_dim=7 does not divide"),
            ({"norm_eps": 0.0}, "eps must be positive"),
        ],
    )
    def test_config_errors(self, changes: dict[str, object], message: str) -> None:
        case = golden.load("s01")
        with pytest.raises(ValueError, match=message):
            from_official(case.config | changes, case.params)

    def test_missing_config_fields_are_named(self) -> None:
        with pytest.raises(ValueError, match=r"config lacks \['n_head', 'block_size'\]"):
            official_config({"n_embd": 32})

    def test_parameter_errors(self) -> None:
        case = golden.load("s01")
        params = dict(case.params)
        del params["q.weight"], params["op2.mix.Vt"]
        with pytest.raises(ValueError, match=r"lacks \['op2.mix.Vt', 'q.weight'\]"):
            from_official(case.config, params)
        with pytest.raises(ValueError, match=r"holds \['q.bias', 'rope.inv_freq'\]"):
            from_official(case.config, {**case.params, "rope.inv_freq": torch.ones(1), "q.bias": torch.ones(8)})
        with pytest.raises(ValueError, match=r"holds \['attn.c_proj.weight', .* without the prefix"):
            from_official(case.config, {f"attn.{name}": p for name, p in case.params.items()})
        for name, shape, expected in (
            ("op.mix.U", (4, 32, 4), (4, 32, 16)),
            ("op2.mix.Vt", (2, 32, 16), (2, 16, 32)),
            ("op.mix.d", (4,), (4, 32)),
            ("conv1.conv.weight", (32, 4), (32, 1, 4)),
            ("q.weight", (32, 8), (8, 32)),
        ):
            with pytest.raises(
                ValueError, match=re.escape(f"{name} has shape {shape}; the config makes it {expected}")
            ):
                from_official(case.config, {**case.params, name: torch.ones(shape)})
        with pytest.raises(ValueError, match=r"must share one dtype: .*'q.weight' is torch.float64"):
            from_official(case.config, {**case.params, "q.weight": case.params["q.weight"].double()})
        with pytest.raises(TypeError, match=r"state_dict\['q.weight'\] must be a floating-point tensor, got list"):
            from_official(case.config, {**case.params, "q.weight": [1.0]})
        with pytest.raises(TypeError, match=r"got torch.int64"):
            from_official(case.config, {**case.params, "q.weight": torch.ones(8, 32, dtype=torch.long)})
        with pytest.raises(ValueError, match=r"unknown parameter 'a.b'"):
            convert_official(case.hyper_config(), {"a.b": torch.ones(1)})

    def test_reset_parameters_of_an_imported_layer(self) -> None:
        """It starts again as the authors' layer would, without the identity in its convolutions."""
        layer = golden.load("s01").layer(torch.float32)
        layer.reset_parameters()
        assert layer.k_conv.weight.abs().max() < 0.2
