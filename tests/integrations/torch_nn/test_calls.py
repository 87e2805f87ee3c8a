"""Every swapped layer is called, whatever the mode, the layout, nesting or compilation, and gives its maps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hypermlp import restore_attention, swap_attention
from tests.integrations.torch_nn.encoders import HEADS, WIDTH, encoder, inputs, same, swapped, triangle


def check_called(model: nn.TransformerEncoder) -> None:
    """Every attention once a forward, in training, evaluation, and evaluation without gradients."""
    calls = []
    for module in model.layers:
        # no hook: hooks make PyTorch leave its fused path by themselves
        attention = module.self_attn
        forward = attention.forward
        attention.forward = lambda *args, forward=forward, **kwargs: (calls.append(1), forward(*args, **kwargs))[1]
    x = inputs(3, 7)
    pad = torch.tensor([[False] * 7, [False] * 5 + [True] * 2, [False] * 7])
    for training in (True, False):
        model.train(training)
        for grad in (True, False):
            for batch in (1, 2, 3):
                for mask in (None, pad[:batch]):
                    calls.clear()
                    with torch.set_grad_enabled(grad):
                        out = model(x[:batch], src_key_padding_mask=mask)
                    assert out.shape == x[:batch].shape
                    assert len(calls) == len(model.layers), f"{training=} {grad=} {batch=}"


@pytest.mark.parametrize("norm_first", [True, False])
def test_every_layer_is_called(norm_first: bool) -> None:
    model = swapped(norm_first=norm_first, activation="gelu")
    assert not model.use_nested_tensor
    check_called(model)


def test_a_multihead_attention_would_not_be_called() -> None:
    class Mine(nn.MultiheadAttention):
        def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:  # type: ignore[override]
            return query, None

    model = encoder()
    for layer in model.layers:
        layer.self_attn = Mine(WIDTH, HEADS, batch_first=True)
    with pytest.raises(AssertionError, match="training=False grad=False"):
        check_called(model)


def test_nested_tensors_are_switched_off_and_back_on() -> None:
    model, plain = encoder(), nn.TransformerEncoder(encoder().layers[0], 2, enable_nested_tensor=False)
    host = nn.ModuleDict({"with": model, "without": plain})
    swap_attention(host, layers=[0], max_lag=8)
    swap_attention(host, layers=[2], max_lag=8)
    assert (model.use_nested_tensor, plain.use_nested_tensor) == (False, False)
    with pytest.raises(ValueError, match="nested"):
        model.layers[0].self_attn(*[torch.nested.nested_tensor([inputs(3), inputs(2)])] * 3)
    restore_attention(copy.deepcopy(host))
    restore_attention(host)
    assert (model.use_nested_tensor, plain.use_nested_tensor) == (True, False)


def test_nested_tensors_left_on_would_break_padded_batches() -> None:
    model = swapped()
    model.use_nested_tensor = True
    with torch.no_grad(), pytest.raises(AttributeError, match="out_proj"):
        model(inputs(2, 4), src_key_padding_mask=torch.tensor([[False] * 4, [False] * 3 + [True]]))


@pytest.mark.parametrize("causal", [False, True])
def test_sequence_first_and_unbatched(causal: bool) -> None:
    model = swapped(causal)
    other = swapped(causal, batch_first=False)
    other.load_state_dict(model.state_dict())
    x = inputs(3, 5)
    mask = triangle(5) if causal else None
    with torch.no_grad():
        out = model(x, mask=mask)
        same(other(x.transpose(0, 1), mask=mask).transpose(0, 1), out)
        same(model(x[1], mask=mask), out[1])
        same(other(x[1], mask=mask), out[1])
        pad = torch.tensor([False] * 3 + [True] * 2)
        same(
            model(x[1], mask=None if mask is None else mask != 0, src_key_padding_mask=pad)[:3],
            model(x[1, :3], mask=None if mask is None else triangle(3)),
        )


def test_maps() -> None:
    attention, x = swapped().layers[0].self_attn, inputs(2, 5)
    pad = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    out, average = attention(x, x, x, key_padding_mask=pad)
    _, maps = attention(x, x, x, key_padding_mask=pad, average_attn_weights=False)
    assert maps.shape == (2, attention.mixer.config.num_heads, 5, 5)
    same(average, maps.mean(1))
    assert not maps[1, :, :, 3:].any()
    mixer = attention.mixer
    read = torch.einsum("bhts,bshv->bthv", maps[:1], mixer.keys_values(x[:1])[1])
    same(mixer.output(read.flatten(-2), mixer.gates(x[:1])), out[:1])
    row = x[0]
    single, one = attention(row, row, row)
    assert (single.shape, one.shape) == ((5, WIDTH), (5, 5))
    assert attention(x, x, x, need_weights=False)[1] is None


def test_compiles_whole() -> None:
    layer, x = swapped(causal=True).layers[0], inputs(2, 8)
    pad = torch.tensor([[False] * 8, [False] * 5 + [True] * 3])
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    later = torch.ones(8, 8, dtype=torch.bool).triu(1)
    with torch.no_grad():
        same(compiled(x, later, pad, True), layer(x, later, pad, True))
        with pytest.raises(RuntimeError, match="cannot obey"):
            compiled(x, later.T, pad, True)


def test_a_single_layer_can_be_swapped_before_the_encoder_is_built() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 24, batch_first=True)
    swap_attention(layer, max_lag=16)
    with pytest.warns(UserWarning, match="enable_nested_tensor"):
        model = nn.TransformerEncoder(layer, 2)
    check_called(model)


def test_an_argument_that_is_not_known_is_refused() -> None:
    attention, x = swapped().layers[0].self_attn, inputs(2, 5)
    assert torch.equal(attention(x, x, x, rope=None)[0], attention(x, x, x)[0])
    with pytest.raises(TypeError, match=r"HyperSelfAttention got rope=a Tensor from torch \d.* leave it out"):
        attention(x, x, x, rope=x)


class Block(nn.Module):
    """As vision transformers of torchvision call attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.self_attention = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y, _ = self.self_attention(y, y, y, need_weights=False)
        return x + y


def test_it_is_one_node_of_a_traced_model() -> None:
    model, x = nn.Sequential(Block(), Block()).eval(), inputs(2, 5)
    stock = [node.target for node in torch.fx.symbolic_trace(model).graph.nodes if node.op == "call_module"]
    swap_attention(model, max_lag=8)
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == stock
    with torch.no_grad():
        assert torch.equal(traced(x), model(x))
