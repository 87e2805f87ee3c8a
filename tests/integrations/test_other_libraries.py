"""vit-pytorch, x-transformers and open_clip with hyper layers, each where its package is installed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hypermlp import build_layer, restore_attention, swap_attention
from hypermlp.integrations.hosts.torch_nn import HyperSelfAttention
from hypermlp.integrations.sites import CROSS, find_sites
from tests.integrations.packages import package


def ready(model: nn.Module) -> Any:
    """In evaluation, in float64, with weights that show a mistake."""
    torch.manual_seed(0)
    model = model.double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.2)
    return model


def vit(**options: Any) -> Any:
    sizes = {"image_size": 16, "patch_size": 4, "num_classes": 5, "dim": 32, "depth": 2, "heads": 4, "mlp_dim": 48}
    return ready(package("vit_pytorch").ViT(**(sizes | {"dim_head": 8} | options)))


def simple_vit() -> Any:
    made = package("vit_pytorch").SimpleViT(
        image_size=16, patch_size=4, num_classes=5, dim=32, depth=2, heads=4, mlp_dim=48, dim_head=8
    )
    return ready(made)


def clip(**options: Any) -> Any:
    text = {"context_length": 9, "vocab_size": 67, "width": 32, "heads": 4, "layers": 2}
    vision = {"image_size": 16, "patch_size": 4, "width": 32, "layers": 2, "head_width": 8}
    made = package("open_clip").CLIP(16, vision_cfg=vision, text_cfg=text | options)
    return ready(made)


def xt(kind: str = "Decoder", **options: Any) -> Any:
    library = package("x_transformers")
    layers = getattr(library, kind)(dim=32, depth=2, heads=4, attn_dim_head=8, **options)
    return ready(library.TransformerWrapper(num_tokens=67, max_seq_len=24, attn_layers=layers))


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(4, 67, shape, generator=torch.Generator().manual_seed(seed))


def pictures(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def same(actual: Tensor, expected: Tensor, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-9)


def in_place(swapped: Any, plain: Any, make: Callable[[nn.Module, nn.Module], Callable[..., Any]]) -> Any:
    """``plain`` with a separate layer of the reference path called in each place that ``swapped`` has one."""
    for site in find_sites(swapped)[0]:
        assert site.replaced is not None
        layer = build_layer(site.replaced.config, backend="reference").double().eval()
        layer.load_state_dict(site.replaced.layer.state_dict())
        module = plain.get_submodule(site.names[0])
        module.forward = make(layer, module)
    return plain


@pytest.mark.parametrize(("make", "rows"), [(vit, 17), (simple_vit, 16)])
@torch.no_grad()
def test_vit_pytorch_keeps_its_norm(make: Callable[[], Any], rows: int) -> None:
    model, plain = make(), make()
    out = model(pictures())
    report = swap_attention(model)
    assert {entry.layer.config.max_lag for entry in report.swapped} == {rows}
    gone = {name for entry in report.swapped for name in entry.gone}
    assert gone == (
        {"to_qkv.weight", "to_out.0.weight", "to_out.0.bias"} if make is vit else {"to_qkv.weight", "to_out.weight"}
    )
    assert "its parameters to_qkv.weight" in str(report)
    expected = in_place(model, plain, lambda layer, module: lambda x: layer(module.norm(x)))(pictures())
    same(model(pictures()), expected)
    assert not torch.allclose(out, expected)
    again = make()
    swap_attention(again)
    again.load_state_dict(model.state_dict())
    same(again(pictures()), expected)
    restore_attention(model)
    assert torch.equal(model(pictures()), out)


@pytest.mark.parametrize("options", [{}, {"heads": 1, "dim_head": 32}])
@torch.no_grad()
def test_vit_pytorch_from_attention(options: dict[str, Any]) -> None:
    """One head of full width has no output projection."""
    model = vit(**options)
    out = model(pictures())
    swap_attention(model, "softmax", init="from_attention")
    same(model(pictures()), out)


def test_vit_pytorch_trains_with_its_dropout() -> None:
    model = vit(dropout=0.5).train()
    swap_attention(model)
    assert not torch.equal(model(pictures()), model(pictures()))
    model(pictures()).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@torch.no_grad()
def test_open_clip_sees_pictures_both_ways_and_text_one_way() -> None:
    model, plain = clip(), clip()
    report = swap_attention(model)
    assert not report.left
    kinds = {
        entry.name.startswith("visual"): (entry.layer.config.causal, entry.layer.config.max_lag)
        for entry in report.swapped
    }
    assert kinds == {True: (False, 17), False: (True, 9)}

    def stand_in(layer: nn.Module, module: nn.Module) -> Callable[..., Any]:
        return lambda query, key, value, **_: (layer(query), None)

    in_place(model, plain, stand_in)
    same(model.encode_image(pictures()), plain.encode_image(pictures()))
    same(model.encode_text(tokens(3, 9)), plain.encode_text(tokens(3, 9)))


@torch.no_grad()
def test_open_clip_from_attention() -> None:
    model = clip()
    image, text = model.encode_image(pictures()), model.encode_text(tokens(3, 9))
    swap_attention(model, "softmax", init="from_attention")
    same(model.encode_image(pictures()), image)
    same(model.encode_text(tokens(3, 9)), text)


@torch.no_grad()
def test_the_attention_of_open_clips_own() -> None:
    transformer = package("open_clip.transformer")
    mask = torch.full((9, 9), float("-inf"), dtype=torch.float64).triu(1)

    def tower() -> Any:
        model = nn.Module()
        model.positional_embedding = nn.Parameter(torch.zeros(9, 32))
        model.register_buffer("attn_mask", mask)
        model.block = transformer.CustomResidualAttentionBlock(32, 4)
        return ready(model)

    model, plain = tower(), tower()
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    out = plain.block(x, attn_mask=mask)
    report = swap_attention(model)
    assert report.swapped[0].layer.config.causal
    assert report.swapped[0].layer.config.max_lag == 9
    in_place(model, plain, lambda layer, module: lambda x, attn_mask: layer(x))
    same(model.block(x, attn_mask=mask), plain.block(x, attn_mask=mask))
    hidden = torch.isinf(mask)
    same(model.block(x, attn_mask=hidden), plain.block(x, attn_mask=mask))
    with pytest.raises(ValueError, match="without a causal attn_mask"):
        model.block(x)
    restore_attention(model)
    swap_attention(model, "softmax", init="from_attention")
    same(model.block(x, attn_mask=mask), out)
    scaled = nn.ModuleDict({"attn": transformer.Attention(32, 4, scale_heads=True)})
    with pytest.raises(ValueError, match=r"it normalises or scales within \(head_scale\)"):
        swap_attention(scaled, init="from_attention", max_lag=9)


@pytest.mark.parametrize("kind", ["Decoder", "Encoder"])
@pytest.mark.parametrize("options", [{}, {"rotary_pos_emb": True}, {"alibi_pos_bias": True}])
@torch.no_grad()
def test_x_transformers(kind: str, options: dict[str, Any]) -> None:
    model, plain = xt(kind, **options), xt(kind, **options)
    out = plain(tokens(2, 9))
    report = swap_attention(model)
    assert {(entry.layer.config.causal, entry.layer.config.max_lag) for entry in report.swapped} == {
        (kind == "Decoder", 24)
    }
    empty = package("x_transformers.attend").Intermediates

    def stand_in(layer: nn.Module, module: nn.Module) -> Callable[..., Any]:
        return lambda x, mask=None, **_: (layer(x, mask), empty())

    expected = in_place(model, plain, stand_in)(tokens(2, 9))
    same(model(tokens(2, 9)), expected)
    assert not torch.allclose(out, expected)
    mask = torch.arange(9) < torch.tensor([[9], [6]])
    other = torch.where(mask, tokens(2, 9), tokens(2, 9, seed=5))
    a, b = (model(ids, mask=mask) for ids in (tokens(2, 9), other))
    same(a[mask], b[mask])
    same(a[1:, :6], model(tokens(2, 9)[1:, :6]))
    with pytest.raises(ValueError, match="many options"):
        swap_attention(xt(kind, **options), init="from_attention")


@torch.no_grad()
def test_x_transformers_generates_without_its_cache() -> None:
    library = package("x_transformers")
    model = xt()
    assert model.can_cache_kv
    swap_attention(model)
    assert not model.can_cache_kv
    wrapper = library.AutoregressiveWrapper(model)
    made, expected = tokens(2, 5), tokens(2, 5)
    made = wrapper.generate(made, 6, temperature=0.0)
    for _ in range(6):
        expected = torch.cat((expected, model(expected)[:, -1:].argmax(-1)), 1)
    assert torch.equal(made, expected[:, 5:])
    restore_attention(model)
    assert model.can_cache_kv


def test_x_transformers_leaves_what_a_hyper_layer_has_not() -> None:
    model = xt(cross_attend=True)
    report = swap_attention(model)
    assert len(report.swapped) == 2
    assert [entry.reason for entry in report.left] == [CROSS] * 2
    with pytest.raises(ValueError, match="hand values or scores on"):
        swap_attention(xt(add_value_residual=True))
    with pytest.raises(TypeError, match="attn_bias"):
        find_sites(model)[0][0].module(torch.zeros(1, 3, 32).double(), attn_bias=torch.zeros(3, 3))


def test_the_same_name_in_three_libraries() -> None:
    """Each ``Attention`` is read by the adapter of its own library."""
    model = nn.ModuleDict({"vit": vit(), "text": xt(), "clip": clip()})
    report = swap_attention(model)
    assert [entry.was for entry in report.swapped] == ["Attention"] * 4 + ["MultiheadAttention"] * 4
    assert isinstance(copy.deepcopy(model).clip.transformer.resblocks[0].attn, HyperSelfAttention)
