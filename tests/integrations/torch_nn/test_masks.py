"""Padding and causal masks, in every form a host gives them, and the masks that are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hypermlp import swap_attention
from hypermlp.integrations.hosts.torch_nn import HyperSelfAttention
from tests.integrations.torch_nn.encoders import HEADS, encoder, inputs, same, swapped, triangle


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


def blocks(*lengths: int) -> Tensor:
    """Tokens of one document see each other, bool, True for what is seen."""
    return torch.block_diag(*(torch.ones(length, length) for length in lengths)) != 0


DOCUMENTS = "a row of its own, with padding"
WITHOUT = r"no option of the swap does; restore_attention\(model\)"
# the layer's causality, a mask of 9 tokens (True is seen), and what helps
ADVICE: dict[str, tuple[bool, Tensor, str]] = {
    "causal": (False, torch.ones(9, 9).tril() != 0, r"choose swap_attention\(model, causal=True\)"),
    "bidirectional": (True, torch.arange(9).expand(9, 9) < 7, r"choose swap_attention\(model, causal=False\)"),
    "documents": (False, blocks(3, 4, 2), DOCUMENTS),
    "causal documents": (True, blocks(3, 4, 2).tril(), DOCUMENTS),
    "causal documents for a bidirectional layer": (False, blocks(3, 4, 2).tril(), f"{DOCUMENTS}, and .*=True"),
    "documents for a causal layer": (True, blocks(3, 4, 2), f"{DOCUMENTS}, and .*=False"),
    "window": (True, torch.ones(9, 9).tril().triu(-3) != 0, r"max_lag=4"),
    "neighbours": (False, torch.ones(9, 9).tril(2).triu(-2) != 0, WITHOUT),
    "later ones alone": (True, torch.ones(9, 9).triu() != 0, WITHOUT),
}


@pytest.mark.parametrize("kind", ADVICE)
def test_the_advice_is_about_the_mask(kind: str) -> None:
    causal, seen, message = ADVICE[kind]
    attention, x = swapped(causal).layers[0].self_attn, inputs(2, 9)
    with pytest.raises(ValueError, match=message):
        attention(x, x, x, attn_mask=~seen)


def test_following_the_advice_helps() -> None:
    """Documents as rows are what the stock encoder makes of one row with a block-diagonal mask."""
    stock, x = encoder(), inputs(1, 9)
    rows = nn.utils.rnn.pad_sequence(list(x[0].split([3, 4, 2])), batch_first=True)
    pad = torch.arange(4) >= torch.tensor([3, 4, 2])[:, None]
    with torch.no_grad():
        packed = stock(x, mask=~blocks(3, 4, 2))
        same(stock(rows, src_key_padding_mask=pad)[~pad], packed[0])
        swapped()(rows, src_key_padding_mask=pad)
        window = ADVICE["window"][1]
        model = encoder()
        swap_attention(model, causal=True, max_lag=4)
        model(x, mask=~window)


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
