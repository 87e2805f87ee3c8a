"""nanoGPT with hyper layers, on a small model of the same names and calls."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypermlp import restore_attention, swap_attention
from hypermlp.integrations.host import Host
from hypermlp.integrations.hosts.nanogpt import NanoGPTAdapter, NanoGPTAttention


@dataclass
class Config:
    block_size: int = 16
    vocab_size: int = 23
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 16
    dropout: float = 0.0
    bias: bool = True


class CausalSelfAttention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.n_head, self.n_embd = config.n_head, config.n_embd
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.register_buffer("bias", torch.ones(1, 1, config.block_size, config.block_size).tril())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=-1))
        mask = self.bias[0, 0, : x.shape[1], : x.shape[1]] != 0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        out: Tensor = self.resid_dropout(self.c_proj(y))
        return out


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(config.n_embd), nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.mlp = nn.Sequential(nn.Linear(config.n_embd, 32), nn.GELU(), nn.Linear(32, config.n_embd))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class GPT(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                "ln_f": nn.LayerNorm(config.n_embd),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.transformer["wte"](idx) + self.transformer["wpe"].weight[: idx.shape[1]]
        for block in self.transformer["h"]:
            x = block(x)
        logits = self.lm_head(self.transformer["ln_f"](x))
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def crop_block_size(self, block_size: int) -> None:
        self.config.block_size = block_size
        self.transformer["wpe"].weight = nn.Parameter(self.transformer["wpe"].weight[:block_size])
        for block in self.transformer["h"]:
            if hasattr(block.attn, "bias"):
                block.attn.bias = block.attn.bias[:, :, :block_size, :block_size]


def stock(**options: Any) -> GPT:
    torch.manual_seed(0)
    model = GPT(Config(**options)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def swapped(mixer: str = "hyperglu", **options: Any) -> GPT:
    model = stock(**options)
    swap_attention(model, mixer)
    return model


def tokens(batch: int = 3, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(23, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model: GPT, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids)[0]


class MyAdapter(NanoGPTAdapter):
    """One with something of its own, which it needs where it stands."""

    def __init__(self, note: str) -> None:
        super().__init__()
        self.note = note

    def describe(self, module: Any) -> Host:
        return replace(super().describe(module), notes=(self.note,))


def test_an_adapter_built_on_this_one_keeps_what_it_knows() -> None:
    model, mine = stock(), MyAdapter("kept")
    report = swap_attention(model, adapter={CausalSelfAttention: mine})
    assert [(entry.notes, entry.layer.config.max_lag) for entry in report.swapped] == [(("kept",), 16)] * 2
    assert mine.length is None


def check_called_and_causal(model: GPT) -> None:
    calls: list[int] = []
    for block in model.transformer["h"]:
        block.attn.mixer.register_forward_hook(lambda *_: calls.append(1))
    ids = tokens()
    for batch in (1, 2, 3):
        calls.clear()
        out = logits(model, ids[:batch])
        assert out.shape == (batch, 12, 23)
        assert len(calls) == 2
    other = torch.cat((ids[:, :5], tokens(3, 7, seed=1)), dim=1)
    difference = (logits(model, other) - out).abs()
    assert difference[:, :5].max() < 1e-6
    assert difference[:, 5:].max() > 1e-2


@pytest.mark.parametrize("mixer", ["hyperglu", "hypermlp", "relu", "softmax"])
def test_called_and_causal(mixer: str) -> None:
    check_called_and_causal(swapped(mixer))


def test_a_layer_that_sees_later_tokens_would_be_noticed() -> None:
    model = swapped()
    model.transformer["h"][0].attn.mixer.v_conv.register_forward_pre_hook(lambda module, args: (args[0].flip(1),))
    with pytest.raises(AssertionError):
        check_called_and_causal(model)


def check_cropping(model: GPT) -> None:
    ids = tokens(2, 7)
    out = logits(model, ids)
    model.crop_block_size(8)
    torch.testing.assert_close(logits(model, ids), out)


def test_the_block_can_be_cropped() -> None:
    model = swapped()
    assert [block.attn.mixer.config.max_lag for block in model.transformer["h"]] == [16, 16]
    check_cropping(model)


def test_an_attribute_called_bias_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NanoGPTAttention, "bias", torch.zeros(16), raising=False)
    with pytest.raises(IndexError):
        check_cropping(swapped())


@pytest.mark.parametrize("bias", [True, False])
def test_softmax_from_attention_is_the_host(bias: bool) -> None:
    model = stock(bias=bias).double()
    out = logits(model, tokens())
    swap_attention(model, "softmax", init="from_attention")
    torch.testing.assert_close(logits(model, tokens()), out, rtol=1e-10, atol=1e-10)
    restore_attention(model)
    assert torch.equal(logits(model, tokens()), out)


def test_dropout_is_the_hosts_and_learning_reaches_everything() -> None:
    model = swapped(dropout=0.5).train()
    attention = model.transformer["h"][0].attn
    x = torch.randn(1, 16, 16)
    # the first tokens see few others, of which selection may leave none
    assert 0.3 < (attention(x) == 0)[:, 4:].float().mean() < 0.7
    assert not (attention.eval()(x) == 0)[:, 4:].any()
    loss = model(tokens(), tokens(seed=2))[1]
    assert loss is not None
    loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing


def test_others_of_that_name_are_left() -> None:
    other = type("CausalSelfAttention", (nn.Module,), {})
    with pytest.raises(ValueError, match="not built as nanoGPT's: no c_attn, c_proj, n_head, n_embd"):
        swap_attention(nn.ModuleDict({"attn": other()}))


def test_without_a_config_the_length_is_asked_for() -> None:
    model = nn.ModuleDict({"attn": CausalSelfAttention(Config())})
    with pytest.raises(ValueError, match="max_lag is missing, and this model does not say"):
        swap_attention(model)
    assert swap_attention(model, max_lag=9).swapped[0].layer.config.max_lag == 9


def test_an_argument_that_is_not_known_is_refused() -> None:
    model = stock()
    swap_attention(model)
    attention, x = model.transformer["h"][0].attn, torch.randn(2, 5, 16)
    assert torch.equal(attention(x, kv_cache=None), attention(x))
    with pytest.raises(TypeError, match="NanoGPTAttention got kv_cache=a dict from nanoGPT"):
        attention(x, kv_cache={})
