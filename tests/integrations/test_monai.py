"""MONAI's vision transformers, decoders and diffusion models with hyper layers, where the package is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hypermlp import restore_attention, swap_attention
from hypermlp.integrations.sites import CROSS
from tests.integrations.packages import package
from tests.integrations.test_other_libraries import in_place, pictures, ready, same, tokens

_VIT = {"in_channels": 3, "img_size": 16, "patch_size": 4, "hidden_size": 32, "mlp_dim": 48, "num_layers": 2}


def vit(**options: Any) -> Any:
    made = package("monai.networks.nets").ViT(**(_VIT | {"num_heads": 4, "spatial_dims": 2} | options))
    return ready(made)


def decoder(**options: Any) -> Any:
    sizes = {"num_tokens": 67, "max_seq_len": 9, "attn_layers_dim": 32, "attn_layers_depth": 2, "attn_layers_heads": 4}
    return ready(package("monai.networks.nets").DecoderOnlyTransformer(**(sizes | options)))


def block(**options: Any) -> Any:
    """One attention in a model of its own."""
    made = package("monai.networks.blocks").SABlock(**({"hidden_size": 32, "num_heads": 4} | options))
    return ready(nn.ModuleDict({"attn": made}))


def stand_in(layer: nn.Module, module: nn.Module) -> Callable[..., Any]:
    return lambda x, attn_mask=None: layer(x, attn_mask)


@pytest.mark.parametrize(("options", "rows"), [({}, 16), ({"classification": True, "num_classes": 5}, 17)])
@torch.no_grad()
def test_vision_transformers(options: dict[str, Any], rows: int) -> None:
    model, plain = vit(**options), vit(**options)
    out = model(pictures())[0]
    report = swap_attention(model)
    assert {entry.layer.config.max_lag for entry in report.swapped} == {rows}
    assert not report.left
    expected = in_place(model, plain, stand_in)(pictures())[0]
    same(model(pictures())[0], expected)
    assert not torch.allclose(out, expected)
    again = vit(**options)
    swap_attention(again)
    again.load_state_dict(model.state_dict())
    same(again(pictures())[0], expected)
    restore_attention(model)
    assert torch.equal(model(pictures())[0], out)


@torch.no_grad()
def test_a_volume() -> None:
    model = ready(package("monai.networks.nets").ViT(**_VIT, num_heads=4, spatial_dims=3))
    assert {entry.layer.config.max_lag for entry in swap_attention(model).swapped} == {64}
    assert model(torch.randn(1, 3, 16, 16, 16, dtype=torch.float64))[0].isfinite().all()


@torch.no_grad()
def test_decoders_are_causal_and_cross_attention_stays() -> None:
    model, plain = decoder(with_cross_attention=True), decoder(with_cross_attention=True)
    report = swap_attention(model)
    assert {(entry.layer.config.causal, entry.layer.config.max_lag) for entry in report.swapped} == {(True, 9)}
    assert [(entry.was, entry.reason) for entry in report.left] == [("CrossAttentionBlock", CROSS)] * 2
    context, ids = torch.randn(2, 5, 32, dtype=torch.float64), tokens(2, 9)
    same(model(ids, context), in_place(model, plain, stand_in)(ids, context))
    same(model(ids, context)[:, :6], model(ids[:, :6], context))
    with pytest.raises(ValueError, match="MONAI's causal attention takes none"):
        model.blocks[0](torch.zeros(2, 9, 32).double(), context=context, attn_mask=torch.ones(2, 9))


@pytest.mark.parametrize(
    "options", [{}, {"use_combined_linear": False, "qkv_bias": True}, {"dim_head": 4}, {"include_fc": False}]
)
@torch.no_grad()
def test_from_attention(options: dict[str, Any]) -> None:
    model, x = block(**options), torch.randn(2, 9, 32, dtype=torch.float64)
    mask = (torch.arange(9) < torch.tensor([[9], [6]])).long()
    out, masked = model.attn(x), model.attn(x, mask)
    swap_attention(model, "softmax", init="from_attention")
    same(model.attn(x), out)
    same(model.attn(x, mask)[mask == 1], masked[mask == 1])


@torch.no_grad()
def test_padding_is_as_if_it_were_not_there() -> None:
    model, x = block(), torch.randn(2, 9, 32, dtype=torch.float64)
    swap_attention(model, max_lag=9)
    mask = torch.arange(9) < torch.tensor([[9], [6]])
    a, b = model.attn(x, mask), model.attn(torch.where(mask[..., None], x, torch.randn_like(x)), mask)
    same(a[mask], b[mask])
    with pytest.raises(ValueError, match=r"attn_mask must be \[2, 9\], 0 for padding, got \[9, 9\]"):
        model.attn(x, torch.ones(9, 9))


def test_what_a_hyper_layer_has_not() -> None:
    report = swap_attention(block(rel_pos_embedding="decomposed", input_size=(3, 3), save_attn=True), max_lag=9)
    assert "biases by relative position" in str(report)
    assert "keeps its last map" in str(report)
    assert "rel_positional_embedding.rel_pos_arr" in " ".join(report.swapped[0].gone)
    with pytest.raises(ValueError, match=r"not offered for this host .*relative position"):
        swap_attention(block(rel_pos_embedding="decomposed", input_size=(3, 3)), init="from_attention", max_lag=9)
    with pytest.raises(ValueError, match="max_lag is missing"):
        swap_attention(block())
    with pytest.raises(ValueError, match="it changes the width, 32 to 16"):
        swap_attention(block(dim_head=4, include_fc=False), max_lag=9)
    flash = block(use_flash_attention=True)
    swap_attention(flash, max_lag=9)
    with pytest.raises(ValueError, match="flash attention takes one of scores"):
        flash.attn(torch.zeros(9, 9, 32).double(), torch.ones(9, 9, dtype=torch.bool))
    with pytest.raises(TypeError, match="context"):
        flash.attn(torch.zeros(9, 9, 32).double(), context=1)


def test_a_masked_autoencoder_keeps_the_attention_that_sees_patches_in_random_order() -> None:
    model = ready(
        package("monai.networks.nets").MaskedAutoEncoderViT(
            **_VIT, num_heads=4, spatial_dims=2, decoder_hidden_size=32, decoder_mlp_dim=48, decoder_num_layers=2,
            decoder_num_heads=4,
        )
    )  # fmt: skip
    report = swap_attention(model)
    assert [entry.name for entry in report.swapped] == ["decoder_blocks.0.attn", "decoder_blocks.1.attn"]
    assert {entry.layer.config.max_lag for entry in report.swapped} == {17}
    assert [entry.name for entry in report.left] == ["blocks.0.attn", "blocks.1.attn"]
    assert "random order" in report.left[0].reason
    assert model(pictures(2))[0].isfinite().all()


def test_trained_with_dropout() -> None:
    model = vit(dropout_rate=0.5).train()
    swap_attention(model)
    x = torch.randn(1, 16, 32, dtype=torch.float64)
    attention = model.blocks[0].attn
    assert not torch.equal(attention(x), attention(x))
    out: Tensor = model(pictures())[0]
    out.square().mean().backward()
    # its blocks have a norm for cross-attention that they have not
    unused = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert all("norm_cross_attn" in name for name in unused)
