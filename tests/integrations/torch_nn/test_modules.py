"""Which attention modules are swapped, which are left, and which of them are causal."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hypermlp import restore_attention, swap_attention
from hypermlp.integrations import register, registry
from hypermlp.integrations.hosts.torch_nn import MultiheadAdapter, SelfAttentionAdapter
from tests.integrations.torch_nn.encoders import HEADS, WIDTH, encoder, inputs, same, swapped, triangle


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
    assert len(swap_attention(Pool(), max_lag=4).swapped) == 1
    wide = nn.ModuleDict({"self_attn": nn.MultiheadAttention(WIDTH, HEADS, kdim=8)})
    with pytest.raises(ValueError, match="a width of their own"):
        swap_attention(wide)


def test_another_class_of_that_name_is_left() -> None:
    other = type("MultiheadAttention", (nn.Module,), {})
    with pytest.raises(ValueError, match="no attention of ModuleDict is known"):
        swap_attention(nn.ModuleDict({"self_attn": other()}))


def test_causal_is_an_option_of_these_hosts_alone() -> None:
    with pytest.raises((TypeError, ValueError), match="causal must be True or False"):
        swap_attention(encoder(), causal="yes")
    report = swap_attention(encoder(), causal=True, max_lag=8)
    assert all(s.layer.config.causal and s.layer.config.layout == "lag" for s in report.swapped)


class Seventeen(nn.Module):
    """A picture model as people write it: an encoder of torch.nn under learned positions."""

    def __init__(self, positions: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.pos_embed = positions
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, dim_feedforward=8, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.encoder(x)
        return out


@pytest.mark.parametrize("shape", [(1, 17, WIDTH), (17, 1, WIDTH), (17, WIDTH)])
def test_the_length_is_what_learned_positions_have(shape: tuple[int, ...]) -> None:
    for positions in (nn.Parameter(torch.zeros(shape)), nn.Embedding(17, WIDTH)):
        model = Seventeen(positions)
        report = swap_attention(model)
        assert report.swapped[0].layer.config.max_lag == 17
        assert model(torch.randn(2, 17, WIDTH)).shape == (2, 17, WIDTH)


def test_a_length_that_nothing_says_is_asked_for() -> None:
    model = Seventeen(nn.Parameter(torch.zeros(1, 17, WIDTH)))
    model.other_pos = nn.Parameter(torch.zeros(1, 9, WIDTH))
    for unclear in (model, encoder()):
        with pytest.raises(ValueError, match=r"max_lag is missing, and this model .*: pass max_lag="):
            swap_attention(unclear)


def test_tables_larger_than_the_projections_are_warned_of() -> None:
    report = swap_attention(encoder(), max_lag=512)
    assert len(report.warnings) == 1
    assert "the tables of 512 rows have" in str(report)
    assert not swap_attention(encoder(), max_lag=4, mix_rank=1).warnings
