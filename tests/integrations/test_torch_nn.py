"""``torch.nn`` encoders and decoders with hyper layers: calls, masks of every kind, shapes, the way back."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hypermlp import restore_attention, swap_attention
from hypermlp.integrations import register, registry
from hypermlp.integrations.hosts.torch_nn import HyperSelfAttention, MultiheadAdapter, SelfAttentionAdapter

WIDTH, HEADS = 16, 4


def encoder(layers: int = 2, **options: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    options = {"dim_feedforward": 24, "dropout": 0.0, "batch_first": True} | options
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, **options)
    nested = options["batch_first"] and not options.get("norm_first") and options.get("bias", True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=nested).eval()


def swapped(causal: bool = False, **options: Any) -> nn.TransformerEncoder:
    model = encoder(**options)
    torch.manual_seed(1)
    swap_attention(model, causal=causal, max_lag=32)
    return model


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed))


def triangle(length: int) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(length)


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# calls


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
    swap_attention(host, layers=[0])
    swap_attention(host, layers=[2])
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


# masks


def check_padding(model: nn.TransformerEncoder, as_float: bool) -> None:
    """A padded row is the row alone, in training, evaluation, and evaluation without gradients."""
    lengths = (7, 4, 1)
    x = inputs(3, 7)
    pad = torch.arange(7) >= torch.tensor(lengths)[:, None]
    mask = torch.zeros(3, 7).masked_fill(pad, float("-inf")) if as_float else pad
    for training in (True, False):
        model.train(training)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                out = model(x, src_key_padding_mask=mask)
                alone = [model(x[row : row + 1, :length]) for row, length in enumerate(lengths)]
            for row, length in enumerate(lengths):
                same(out[row, :length], alone[row][0])


@pytest.mark.parametrize("as_float", [False, True])
def test_padding(as_float: bool) -> None:
    check_padding(swapped(), as_float)


def test_masks_read_the_other_way_round_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    read = HyperSelfAttention._valid
    monkeypatch.setattr(HyperSelfAttention, "_valid", lambda *args: None if read(*args) is None else ~read(*args))
    with pytest.raises(AssertionError):
        check_padding(swapped(), as_float=False)


def test_left_padding_of_a_causal_layer() -> None:
    model, x = swapped(causal=True), inputs(2, 6)
    pad = torch.tensor([[False] * 6, [True] * 2 + [False] * 4])
    with torch.no_grad():
        out = model(x, mask=triangle(6) != 0, src_key_padding_mask=pad)
        same(out[1:, 2:], model(x[1:, 2:], mask=triangle(4)))


CAUSAL: dict[str, Callable[[int], dict[str, Any]]] = {
    "float": lambda n: {"mask": triangle(n)},
    "bool": lambda n: {"mask": torch.ones(n, n, dtype=torch.bool).triu(1)},
    "hint": lambda n: {"mask": triangle(n), "is_causal": True},
    "hint alone": lambda n: {"is_causal": True},
    "large numbers": lambda n: {"mask": torch.zeros(n, n).masked_fill(triangle(n) != 0, -1e9)},
    "each head": lambda n: {"mask": triangle(n).expand(2 * HEADS, n, n)},
    "with padding": lambda n: {"mask": triangle(n), "src_key_padding_mask": torch.zeros(2, n)},
}


def check_causal(model: nn.TransformerEncoder, kind: str) -> None:
    x = inputs(2, 9)
    for kept in (1, 4, 8):
        other = torch.cat((x[:, :kept], inputs(2, 9 - kept, seed=1)), dim=1)
        with torch.no_grad():
            a, b = (model(part, **CAUSAL[kind](9)) for part in (x, other))
        assert (a - b)[:, :kept].abs().max() < 1e-6
        assert (a - b)[:, kept:].abs().max() > 1e-2


@pytest.mark.parametrize("kind", CAUSAL)
def test_causal_masks(kind: str) -> None:
    check_causal(swapped(causal=True), kind)


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_bidirectional_layer_refuses_causal_masks(kind: str) -> None:
    with pytest.raises(ValueError, match=r"bidirectional.*swap_attention\(model, causal=True\)"):
        swapped()(inputs(2, 9), **CAUSAL[kind](9))


def test_a_layer_that_ignores_causality_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HyperSelfAttention, "_valid", lambda *args: None)
    with pytest.raises(AssertionError):
        check_causal(swapped(), "float")


def test_a_causal_layer_refuses_a_call_without_its_mask() -> None:
    model = swapped(causal=True)
    with pytest.raises(ValueError, match=r"causal and was called with no causal mask.*causal=False"):
        model(inputs(2, 3))
    model(inputs(2, 1))  # one token has no later ones


ODD_MASKS: dict[str, tuple[bool, Tensor, str]] = {
    "window": (True, ~torch.ones(9, 9, dtype=torch.bool).tril().triu(-2), "hides others"),
    "block": (True, torch.block_diag(*[torch.ones(3, 3)] * 3) == 0, "shows later tokens, or hides others"),
    "future": (True, triangle(9).T, "shows later tokens"),
    "diagonal alone": (False, ~torch.eye(9, dtype=torch.bool), "hides more than padding"),
    "bias": (False, torch.randn(9, 9), "adds other numbers"),
    "heads": (False, torch.arange(8 * 81).view(8, 9, 9) == 40, "differs from head to head"),
    "shape": (False, torch.zeros(9, 8), r"must be \[9, 9\] or \[8, 9, 9\]"),
    "integers": (False, torch.zeros(9, 9, dtype=torch.long), "attn_mask must be bool or additive"),
}


@pytest.mark.parametrize("kind", ODD_MASKS)
def test_masks_that_cannot_be_obeyed_are_refused(kind: str) -> None:
    causal, mask, message = ODD_MASKS[kind]
    attention, x = swapped(causal).layers[0].self_attn, inputs(2, 9)
    with pytest.raises((ValueError, TypeError), match=message):
        attention(x, x, x, attn_mask=mask)


def test_a_window_of_the_layers_own_width_is_understood() -> None:
    model = encoder()
    swap_attention(model, causal=True, max_lag=3)
    lag = torch.arange(9)[:, None] - torch.arange(9)
    with torch.no_grad():
        x = inputs(2, 9)
        same(model(x, mask=(lag < 0) | (lag >= 3)), model(x, mask=lag < 0))
        with pytest.raises(ValueError, match="hides others"):
            model(x, mask=(lag < 0) | (lag >= 2))


def test_padding_given_as_attn_mask_for_each_row() -> None:
    model, x = swapped(), inputs(2, 6)
    pad = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    joint = pad[:, None, None].expand(2, HEADS, 6, 6).reshape(2 * HEADS, 6, 6)
    with torch.no_grad():
        out, expected = (model(x, **given) for given in ({"mask": joint}, {"src_key_padding_mask": pad}))
    same(out, expected)


def test_both_masks_may_hide_padding() -> None:
    model, x = swapped(causal=True), inputs(1, 6)
    first, last = (torch.arange(6) == place for place in (0, 5))
    both = (torch.ones(6, 6).triu(1) != 0) | first
    with torch.no_grad():
        out = model(x, mask=both, src_key_padding_mask=last[None])
        expected = model(x, mask=torch.ones(6, 6).triu(1) != 0, src_key_padding_mask=(first | last)[None])
        alone = model(x[:, 1:5], mask=torch.ones(4, 4).triu(1) != 0)
    same(out, expected)
    same(out[:, 1:5], alone)
    with torch.no_grad():
        assert not torch.allclose(model(x, mask=both)[:, 5], out[:, 5])


def test_a_padding_mask_of_another_shape_is_refused() -> None:
    attention, x = swapped().layers[0].self_attn, inputs(2, 9)
    with pytest.raises(ValueError, match=r"key_padding_mask must be \[batch, length\] = \(2, 9\)"):
        attention(x, x, x, key_padding_mask=torch.zeros(9, dtype=torch.bool))


# shapes, maps


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
    read = torch.einsum("bhts,bshv->bthv", maps[:1], mixer.keys_values(x[:1], None)[1])
    same(mixer.output(read, mixer.gates(x[:1])), out[:1])
    row = x[0]
    single, one = attention(row, row, row)
    assert (single.shape, one.shape) == ((5, WIDTH), (5, 5))
    assert attention(x, x, x, need_weights=False)[1] is None


# which modules


def test_cross_attention_is_left_and_decoders_are_causal() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(WIDTH, HEADS, 1, 2, 24, dropout=0.0, batch_first=True).eval()
    src, tgt = inputs(2, 6), inputs(2, 5, seed=1)
    pad = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    kwargs = {"tgt_mask": triangle(5), "src_key_padding_mask": pad, "memory_key_padding_mask": pad}
    with torch.no_grad():
        stock = model(src, tgt, **kwargs)
    report = swap_attention(model, max_lag=8)
    assert [s.name for s in report.swapped] == [
        "encoder.layers.0.self_attn", "decoder.layers.0.self_attn", "decoder.layers.1.self_attn",
    ]  # fmt: skip
    assert [s.layer.config.causal for s in report.swapped] == [False, True, True]
    assert {(s.name, "cross-attention" in s.reason) for s in report.left} == {
        (f"decoder.layers.{n}.multihead_attn", True) for n in range(2)
    }
    with torch.no_grad():
        out = model(src, tgt, **kwargs)
        assert (out - stock).abs().max() > 1e-2
        same(out[:, :3], model(src, torch.cat((tgt[:, :3], inputs(2, 2, seed=5)), 1), **kwargs)[:, :3])
    restore_attention(model)
    with torch.no_grad():
        assert torch.equal(model(src, tgt, **kwargs), stock)


def test_cross_attention_by_force_is_refused_when_it_runs() -> None:
    attention, x = swapped().layers[0].self_attn, inputs(2, 5)
    with pytest.raises(ValueError, match="must be one tensor"):
        attention(x, x.clone(), x)


def test_elsewhere_it_is_left_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(WIDTH, HEADS)

    monkeypatch.setattr(registry, "_registered", {})
    register(MultiheadAdapter(), "MultiheadAttention")
    with pytest.raises(ValueError, match=r"attn \(MultiheadAttention\) is left alone: it may read another sequence"):
        swap_attention(Pool())
    register(SelfAttentionAdapter(), "MultiheadAttention")
    assert len(swap_attention(Pool()).swapped) == 1
    wide = nn.ModuleDict({"self_attn": nn.MultiheadAttention(WIDTH, HEADS, kdim=8)})
    with pytest.raises(ValueError, match="a width of their own"):
        swap_attention(wide)


def test_another_class_of_that_name_is_left() -> None:
    other = type("MultiheadAttention", (nn.Module,), {})
    with pytest.raises(ValueError, match=r"is not torch\.nn"):
        swap_attention(nn.ModuleDict({"self_attn": other()}))


def test_causal_is_an_option_of_these_hosts_alone() -> None:
    with pytest.raises((TypeError, ValueError), match="causal must be True or False"):
        swap_attention(encoder(), causal="yes")
    report = swap_attention(encoder(), causal=True)
    assert all(s.layer.config.causal and s.layer.config.layout == "lag" for s in report.swapped)


# weights


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
    assert len(swap_attention(model).swapped) == 1


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
