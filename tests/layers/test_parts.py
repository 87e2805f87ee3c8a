"""The parts of a layer on their own: convolution, rotation, gates, the softmax baseline's formula."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from hypermlp import SoftmaxAttention
from hypermlp.layers.feature_mixing import GateProjection, Gates
from hypermlp.layers.rotary import rotate
from hypermlp.layers.short_conv import ShortConv


@pytest.mark.parametrize("size", [1, 2, 4, 9])
@pytest.mark.parametrize("length", [1, 3, 8])
def test_the_convolution_is_the_sum_it_says(size, length):
    conv, x = ShortConv(3, size, dtype=torch.float64), torch.randn(2, length, 3).double()
    torch.nn.init.normal_(conv.weight)
    expected = torch.zeros_like(x)
    for t in range(length):
        for s in range(min(size, t + 1)):
            expected[:, t] += conv.weight.detach()[:, -1 - s] * x[:, t - s]
    torch.testing.assert_close(conv(x), expected)


@pytest.mark.parametrize("bounds", [[0, 8], [0, 1, 2, 8], [0, 3, 8], list(range(9))])
def test_the_convolution_does_not_cross_packed_sequences(bounds):
    conv, x = ShortConv(3, 4, dtype=torch.float64), torch.randn(1, 8, 3).double()
    torch.nn.init.normal_(conv.weight)
    packed = conv(x, cu_seqlens=torch.tensor(bounds))
    alone = [conv(x[:, lo:hi]) for lo, hi in itertools.pairwise(bounds)]
    # of other lengths, and so in vectors of other sizes, which a processor may round in another way
    torch.testing.assert_close(packed, torch.cat(alone, 1))
    assert len(bounds) == 2 or not torch.allclose(packed, conv(x))


def test_a_nan_in_a_packed_neighbour_does_not_cross_the_convolution():
    conv, x = ShortConv(3, 4), torch.randn(1, 8, 3)
    x[:, 2] = float("nan")
    out = conv(x, cu_seqlens=torch.tensor([0, 3, 8]))
    assert out[:, 3:].isfinite().all()
    assert out[:, 2].isnan().all()


@pytest.mark.parametrize("width", [2, 6, 16])
def test_rope_is_a_rotation(width):
    x = torch.randn(2, 9, 3, width)
    torch.testing.assert_close(rotate(x, 1e4).norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotate(x, 1e4)[:, 0], x[:, 0])
    assert not torch.allclose(rotate(x, 1e4)[:, 1:], x[:, 1:])
    # a rotation keeps angles between two vectors of the same position as well
    y = torch.randn_like(x)
    dots = (rotate(x, 1e4) * rotate(y, 1e4)).sum(-1)
    torch.testing.assert_close(dots, (x * y).sum(-1), rtol=1e-4, atol=1e-4)


def test_rope_is_relative():
    """The score of two tokens depends on their distance alone."""
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(i: int, j: int) -> float:
        return float((rotate(q, 1e4, i) * rotate(k, 1e4, j)).sum())

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-3)


def test_rope_turns_each_pair_by_its_frequency():
    x = torch.zeros(1, 3, 1, 4)
    x[..., 1] = 1  # first of the second pair, (1, 3)
    angle = 2 * 100.0 ** (-2 / 4)
    expected = torch.tensor([0, math.cos(angle), 0, math.sin(angle)])
    torch.testing.assert_close(rotate(x, 100.0)[0, 2, 0], expected)


def test_rope_offsets_may_differ_by_token():
    x = torch.randn(2, 5, 1, 4)
    offset = torch.tensor([[0, 0, -2, -2, -2], [3, 3, 3, 3, 3]])
    turned = rotate(x, 1e4, offset)
    torch.testing.assert_close(turned[0, 2:], rotate(x[:1, 2:], 1e4)[0])
    torch.testing.assert_close(turned[1:], rotate(x[1:], 1e4, 3))


def test_gates_are_parts_of_one_projection():
    x = torch.randn(2, 3, 8)
    gate = GateProjection(8, (5, 0, 4, 2))
    pre = x @ gate.proj.weight.T + gate.proj.bias
    query, output, routing, readout = gate(x)
    assert output is None
    torch.testing.assert_close(torch.cat((query, routing, readout), -1), torch.sigmoid(pre))
    assert [part.shape[-1] for part in (query, routing, readout)] == [5, 4, 2]
    gate.activation = "identity"
    torch.testing.assert_close(gate(x).routing, pre[..., 5:9])


def test_a_layer_without_gates_has_no_projection_for_them():
    layer = SoftmaxAttention(8, 2)
    assert layer.gate is None
    assert layer.gates(torch.randn(1, 1, 8)) == Gates()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("max_lag", [None, 3])
def test_the_softmax_baseline_is_plain_softmax_attention(causal, max_lag):
    layer = SoftmaxAttention(8, 2, causal=causal, max_lag=max_lag, dtype=torch.float64)
    x = torch.randn(2, 7, 8).double()
    q, k, v = (p(x).view(2, 7, 2, 4).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    i, j = torch.arange(7)[:, None], torch.arange(7)
    hidden = torch.zeros(7, 7, dtype=torch.bool)
    if causal:
        hidden = (j > i) | (i - j >= (max_lag or 7))
    scores = (q @ k.mT / 2).masked_fill(hidden, -math.inf)
    expected = layer.o_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 7, 8))
    torch.testing.assert_close(layer(x), expected)
    assert sum(p.numel() for p in layer.parameters()) == 4 * 8 * 8
