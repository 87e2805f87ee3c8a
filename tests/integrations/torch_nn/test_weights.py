"""The weights: taken from the host's attention, given gradients, saved and loaded."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from hypermlp import restore_attention, swap_attention
from tests.integrations.torch_nn.encoders import HEADS, WIDTH, encoder, inputs, swapped, triangle


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_softmax_from_attention_is_the_host(causal: bool, bias: bool) -> None:
    model, x = encoder(bias=bias).double(), inputs(2, 9).double()
    mask = triangle(9).double() if causal else None
    with torch.no_grad():
        out = model(x, mask=mask)
        swap_attention(model, "softmax", init="from_attention", causal=causal)
        torch.testing.assert_close(model(x, mask=mask), out, rtol=1e-10, atol=1e-10)
        restore_attention(model)
        swap_attention(model, "softmax", causal=causal)
        assert not torch.allclose(model(x, mask=mask), out)


@pytest.mark.parametrize("extra", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_extra_keys_have_no_place_in_from_attention(extra: dict[str, bool]) -> None:
    model = nn.ModuleDict({"self_attn": nn.MultiheadAttention(WIDTH, HEADS, **extra)})
    with pytest.raises(ValueError, match="use init='fresh'"):
        swap_attention(model, init="from_attention")
    assert len(swap_attention(model, max_lag=8).swapped) == 1


def test_gradients_and_autocast() -> None:
    model = swapped(causal=True).train()
    x = inputs(2, 9)
    for dtype in (torch.float32, torch.bfloat16):
        model.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            model(x, mask=triangle(9)).square().mean().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


def test_state_dict_and_pickle() -> None:
    model, other = swapped(), encoder()
    swap_attention(other, max_lag=32)
    other.load_state_dict(model.state_dict())
    x = inputs(2, 6)
    with torch.no_grad():
        out = model(x)
        assert torch.equal(other(x), out)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), out)
