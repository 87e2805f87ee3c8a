"""At the level of layers too: padding, packing, causality, with convolutions, gates and rotation."""

from __future__ import annotations

import pytest
import torch

from hypermlp import HyperGLU, HyperMLP, ReLUAttention, SoftmaxAttention
from hypermlp.ops.varlen import ALL_TOKENS
from tests.arrangements import Arrangement, assert_same_as_alone
from tests.helpers import BACKENDS, evaluate_layer, tiles
from tests.quick import combinations

HYPER = [HyperGLU, HyperMLP]
BASELINES = [ReLUAttention, SoftmaxAttention]
D = 12
ARRANGEMENTS = {
    "left": Arrangement.padded([6, 9, 1], [3, 0, 8], 9),
    "right": Arrangement.padded([6, 9, 1], [0, 0, 0], 9),
    "both": Arrangement.padded([6, 7, 1], [1, 2, 4], 10),
    "packed": Arrangement.packed([6, 9, 1, 2]),
    "packed with room": Arrangement.packed([6, 9, 1], [2, 0, 3]),
}
SWITCHES = {
    "default": {},
    "window": {"max_lag": 4},
    "bidirectional": {"causal": False},
    "bias and rotation": {"bias": True, "rope": True, "max_lag": 5},
    "without convolution": {"conv_size": 0},
}


def build(cls, backend="auto", **options):
    full = {"max_lag": 32, "conv_size": 4, "q_gate": True, "output_gate": True, "qk_dim": 8, "dtype": torch.float64}
    layer = cls(D, backend=backend, **(full | options))
    with torch.no_grad():
        for p in layer.parameters():  # away from the zeros and near-zeros of the start
            p.add_(0.3 * torch.randn_like(p))
    return layer


def assert_layer_invariant(layer, arrangement, junk):
    lengths = arrangement.lengths
    sequences = [
        {"hidden_states": torch.randn(1, n, D).double(), "weight": torch.randn(1, n, D).double()} for n in lengths
    ]

    def evaluate(streams, attention_mask, cu_seqlens):
        return evaluate_layer(layer, **streams, attention_mask=attention_mask, cu_seqlens=cu_seqlens)

    with tiles(4):
        # the angles of the rotation are float32 by design
        assert_same_as_alone(evaluate, sequences, arrangement, junk, rtol=1e-5 if layer.config.rope else 1e-9)


# what lies in the padding does not meet how many score maps there are: infinity in layers of one map, else those of two
JUNK = combinations(
    HYPER, [1, float("nan"), float("inf")], quick=lambda cls, junk: (cls is HyperMLP) == (junk == float("inf"))
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize(("cls", "junk"), JUNK)
def test_hyper_layers_do_not_see_padding_or_neighbours(backend, cls, arrangement, switch, junk):
    assert_layer_invariant(build(cls, backend, **SWITCHES[switch]), ARRANGEMENTS[arrangement], junk)


@pytest.mark.parametrize("cls", BASELINES)
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("junk", [1, float("nan")])
def test_baselines_do_not_see_padding_or_neighbours(cls, arrangement, switch, junk):
    assert_layer_invariant(build(cls, **SWITCHES[switch]), ARRANGEMENTS[arrangement], junk)


@pytest.mark.parametrize("cls", HYPER + BASELINES)
@pytest.mark.parametrize("broken", ["convolution", "gates", "mask"])
def test_a_part_that_sees_its_neighbours_is_caught(monkeypatch, cls, broken):
    layer = build(cls, bias=True)
    forward, conv, attend = layer.forward, layer.k_conv.forward, layer.attend
    arrangement, junk = ARRANGEMENTS["packed"], 1
    if broken == "convolution":
        monkeypatch.setattr(layer.k_conv, "forward", lambda x, **others: conv(x))
    elif broken == "gates":
        monkeypatch.setattr(layer, "attend", lambda *streams: attend(*streams[:-1], ALL_TOKENS))
    else:
        arrangement = ARRANGEMENTS["left"]
        monkeypatch.setattr(layer, "forward", lambda x, attention_mask=None, **kwargs: forward(x, **kwargs))
    with pytest.raises(AssertionError):
        assert_layer_invariant(layer, arrangement, junk)


@pytest.mark.parametrize("cls", HYPER + BASELINES)
@pytest.mark.parametrize("max_lag", [32, 3])
def test_layers_are_causal(cls, max_lag):
    layer = build(cls, "reference", max_lag=max_lag, rope=True)
    x = torch.randn(2, 9, D).double()
    changed = x.clone()
    changed[:, 5:] = torch.randn(2, 4, D)
    before, after = layer(x), layer(changed)
    if cls is SoftmaxAttention:
        torch.testing.assert_close(before[:, :5], after[:, :5], rtol=1e-12, atol=1e-12)
    else:
        assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("cls", HYPER + BASELINES)
def test_a_masked_token_inside_gives_nothing_and_keeps_its_place(cls):
    layer = build(cls)
    x, mask = torch.randn(2, 8, D).double(), torch.tensor([[1, 1, 0, 1, 0, 0, 1, 1], [1] * 8])
    out = layer(x, mask)
    hidden = x.masked_fill(mask[..., None] == 0, float("nan"))
    assert torch.equal(out, layer(hidden, mask))
    assert not out[mask == 0].any()
    closed = layer(x[:1, mask[0] == 1])
    assert not torch.allclose(out[:1, mask[0] == 1], closed), "lags count positions, holes included"


@pytest.mark.parametrize("cls", HYPER)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nan_in_a_valid_token_stays_in_later_rows_of_its_sequence(cls, value):
    layer, x = build(cls, max_lag=4), torch.randn(1, 20, D).double()
    bad = x.clone()
    bad[:, 6] = value
    bounds = torch.tensor([0, 4, 17, 20])
    clean, marked = layer(x, cu_seqlens=bounds), layer(bad, cu_seqlens=bounds)
    changed = ((clean - marked).abs().nan_to_num(1) > 1e-12).any(-1)[0]
    # the token's own row, those its convolutions reach, and those that reach these
    assert changed.nonzero().flatten().tolist() == list(range(6, 6 + 3 + 4))
