"""Layers that start from the attention they replace."""

from __future__ import annotations

import copy

import pytest
import torch

from hypermlp.integrations import Host, restore_attention, swap_attention
from tests.integrations.toy import ToyAdapter, adapter, build

__all__ = ["adapter"]  # a fixture


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_softmax_from_attention_is_the_host(adapter: ToyAdapter, causal: bool, bias: bool) -> None:
    """With the same selection, full width and no parts of its own, nothing may change."""
    model = build(causal=causal, bias=bias).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    out = model(x)
    swap_attention(model, "softmax", init="from_attention")
    torch.testing.assert_close(model(x), out, rtol=1e-12, atol=1e-12)
    restore_attention(model)
    swap_attention(model, "softmax")
    assert not torch.allclose(model(x), out)


def test_new_parts_start_neutral(adapter: ToyAdapter) -> None:
    """Gates, convolutions, mixings: all present, all as if they were not, and all learning."""
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    plain = build().double()
    full = copy.deepcopy(plain)
    swap_attention(plain, "relu", init="from_attention", qk_dim=16)
    swap_attention(full, "hypermlp", init="from_attention", qk_dim=16)
    torch.testing.assert_close(full(x), plain(x), rtol=1e-12, atol=1e-12)
    full(x).square().sum().backward()
    still = [name for name, parameter in full.named_parameters() if not parameter.grad.any()]
    # the tables before a zero one start to learn one step later
    assert {name.rpartition("mix.")[2] for name in still} <= {"down"}


def test_identity_gates_start_neutral_too(adapter: ToyAdapter) -> None:
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    model, other = build().double(), build().double()
    other.load_state_dict(model.state_dict())
    swap_attention(model, "hyperglu", init="from_attention", gate_activation="identity")
    swap_attention(other, "hyperglu", init="from_attention")
    torch.testing.assert_close(model(x), other(x), rtol=1e-12, atol=1e-12)


def test_the_leading_part_is_the_hosts(adapter: ToyAdapter) -> None:
    model = build(1)
    host = model[0].attention
    swap_attention(model, "hyperglu", init="from_attention", qk_dim=16)
    layer = model[0].attention
    q, k, v = host.qkv.weight.chunk(3)
    # two maps of four heads, two channels each, queries scaled by 4 ** -0.5 and by the gate's rest of a half
    torch.testing.assert_close(layer.q_proj.weight.view(2, 4, 2, 16)[0], q.view(4, 4, 16)[:, :2])
    torch.testing.assert_close(layer.k_proj.weight.view(2, 4, 2, 16)[1], k.view(4, 4, 16)[:, :2])
    torch.testing.assert_close(layer.v_proj.weight, v)
    torch.testing.assert_close(layer.o_proj.weight, 2 * host.out.weight)


def test_a_host_without_projections_is_refused(adapter: ToyAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ToyAdapter, "describe", lambda self, module: Host(module.width, module.heads, max_length=32))
    with pytest.raises(ValueError, match="use init='fresh'"):
        swap_attention(build(), init="from_attention")
