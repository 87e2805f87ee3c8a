"""timm's vision transformers with hyper layers, swapped and built: calls, sizes, starts, weights."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hypermlp import restore_attention, swap_attention
from hypermlp.integrations import resize_positions
from hypermlp.integrations.hosts.timm import TimmAttention, timm_attention
from tests.integrations.packages import package

timm = package("timm")

_SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}


def stock(**options: Any) -> Any:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **(_SIZES | options)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def swapped(mixer: str = "hyperglu", **options: Any) -> Any:
    model = stock(**options)
    swap_attention(model, mixer)
    return model


def images(batch: int = 3, side: int = 16) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))


def logits(model: nn.Module, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(pixels)
    return out


def check_called(model: Any) -> None:
    calls: list[int] = []
    handles = [block.attn.mixer.register_forward_hook(lambda *_: calls.append(1)) for block in model.blocks]
    for batch in (1, 2, 3):
        calls.clear()
        pixels = images(batch)
        out = logits(model, pixels)
        assert len(calls) == len(model.blocks)
        alone = torch.cat([logits(model, pixels[n : n + 1]) for n in range(batch)])
        torch.testing.assert_close(out, alone, rtol=1e-4, atol=1e-5)
    for handle in handles:
        handle.remove()


# tokens before the patches, however timm places them
PREFIXES: dict[str, tuple[dict[str, Any], int]] = {
    "class token": ({}, 1),
    "registers": ({"reg_tokens": 3, "no_embed_class": True}, 4),
    "patches alone": ({"class_token": False, "global_pool": "avg"}, 0),
}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("mixer", ["hyperglu", "hypermlp", "relu", "softmax"])
def test_called(mixer: str, prefix: str) -> None:
    options, tokens = PREFIXES[prefix]
    model = swapped(mixer, **options)
    if mixer.startswith("hyper"):
        assert [block.attn.mixer.config.max_lag for block in model.blocks] == [16 + tokens] * 2
    check_called(model)


def test_a_tuple_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = TimmAttention.forward
    monkeypatch.setattr(TimmAttention, "forward", lambda *args, **kwargs: (forward(*args, **kwargs), None))
    with pytest.raises((AssertionError, TypeError, AttributeError)):
        check_called(swapped())


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("side", [12, 24])
def test_input_sizes_change(prefix: str, side: int) -> None:
    options, tokens = PREFIXES[prefix]
    model = swapped(**options)
    model.set_input_size(img_size=(side, side))
    with pytest.raises(ValueError, match="resize_positions"):
        logits(model, images(side=side))
    assert resize_positions(model, model.patch_embed.grid_size, prefix_tokens=model.num_prefix_tokens) == 2
    assert model.num_prefix_tokens == tokens
    assert logits(model, images(side=side)).isfinite().all()
    restore_attention(model)
    assert logits(model, images(side=side)).isfinite().all()


def test_a_grid_that_is_not_square() -> None:
    model = swapped()
    model.set_input_size(img_size=(8, 20))
    resize_positions(model, (2, 5), prefix_tokens=1)
    assert logits(model, torch.randn(2, 3, 8, 20)).isfinite().all()
    model.set_input_size(img_size=(16, 16))
    with pytest.raises(ValueError, match="no square"):
        resize_positions(model, (4, 4), prefix_tokens=1)
    resize_positions(model, (4, 4), old_grid=(2, 5))
    check_called(model)


def test_softmax_from_attention_is_the_host() -> None:
    model = stock(reg_tokens=2).double()
    pixels = images().double()
    out = logits(model, pixels)
    swap_attention(model, "softmax", init="from_attention")
    torch.testing.assert_close(logits(model, pixels), out, rtol=1e-10, atol=1e-10)
    restore_attention(model)
    assert torch.equal(logits(model, pixels), out)
    with pytest.raises(ValueError, match="use init='fresh'"):
        swap_attention(stock(qk_norm=True), init="from_attention")


def test_within_another_model_and_alone() -> None:
    whole = nn.ModuleDict({"backbone": stock(), "head": nn.Linear(5, 2)})
    report = swap_attention(whole)
    assert [(s.name, s.layer.config.max_lag) for s in report.swapped] == [
        (f"backbone.blocks.{n}.attn", 17) for n in range(2)
    ]
    block = stock().blocks[0]
    swap_attention(block, max_lag=9)
    assert block(torch.randn(2, 9, 32)).shape == (2, 9, 32)


# built with hyper layers


def built(**options: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **_SIZES, attn_layer=timm_attention(max_lag=17, **options))


def test_built_is_swapped() -> None:
    model, other = built().eval(), swapped()
    check_called(model)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, images()), logits(model, images()))
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), images()), logits(model, images()))


def test_the_start_is_the_layers_own_and_not_timms() -> None:
    """timm starts every linear layer with a deviation of 0.02; ours are ``1 / sqrt(fan_in)``."""
    model = built(conv_size=2)
    layer = model.blocks[0].attn.mixer
    assert 0.15 < layer.v_proj.weight.std() < 0.2
    assert layer.config.conv_size == 2
    assert 0.01 < model.blocks[0].mlp.fc1.weight.std() < 0.03


def test_without_its_own_start_it_would_be_timms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(TimmAttention, "init_weights")
    with pytest.raises(AssertionError):
        test_the_start_is_the_layers_own_and_not_timms()


def test_dropout_and_gradients() -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", **_SIZES, proj_drop_rate=0.5, attn_layer=timm_attention("hypermlp", max_lag=17)
    )
    assert [block.attn.proj_drop.p for block in model.blocks] == [0.5, 0.5]
    swap = stock(proj_drop_rate=0.25)
    swap_attention(swap)
    assert [block.attn.proj_drop.p for block in swap.blocks] == [0.25, 0.25]
    model.train()(images()).square().sum().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="max_lag is missing"):
        timm_attention()
    with pytest.raises(ValueError, match="causal is taken from the model"):
        timm_attention("relu", causal=True)
    with pytest.raises(ValueError, match="backend must be one of"):
        timm_attention("relu", backend="cuda")
    timm_attention("relu")(32)


def test_what_timm_says_of_softmax_attention_is_known_by_name() -> None:
    made = timm_attention("relu")
    made(32, num_heads=4, qkv_bias=True, qk_norm=False, norm_layer=nn.LayerNorm, attn_drop=0.1, dim_out=32)
    with pytest.raises(TypeError, match=rf"timm_attention got rope=True from timm {timm.__version__}"):
        made(32, rope=True)
    with pytest.raises(ValueError, match="dim_out=48 changes the width"):
        made(32, dim_out=48)


# calls


def test_an_argument_that_is_not_known_is_refused() -> None:
    attention, x = swapped().blocks[0].attn, torch.randn(2, 17, 32)
    with torch.no_grad():
        assert torch.equal(attention(x, rope=None), attention(x))
        with pytest.raises(TypeError, match=rf"TimmAttention got rope=a Tensor from timm {timm.__version__}"):
            attention(x, rope=torch.ones(17, 8))


@pytest.mark.parametrize("make", [swapped, lambda: built().eval()])
def test_features_by_fx(make: Any) -> None:
    """timm's extractor and torch.fx trace around the attention, which is one node."""
    model, pixels = make(), images()
    seen: list[Tensor] = []
    model.blocks[0].attn.register_forward_hook(lambda module, args, out: seen.append(out))
    expected = logits(model, pixels)
    extractor = timm.models.create_feature_extractor(model, ["blocks.0.attn", "head"])
    with torch.no_grad():
        found = extractor(pixels)
    assert torch.equal(found["head"], expected)
    assert torch.equal(found["blocks.0.attn"], seen[0])
    sizes = {name: size for name, size in _SIZES.items() if name != "num_classes"}
    pyramid = timm.create_model(
        "vit_tiny_patch16_224", **sizes, features_only=True, feature_cls="fx", out_indices=(0, 1),
        attn_layer=timm_attention(max_lag=17),
    )  # fmt: skip
    assert [part.shape for part in pyramid(pixels)] == [(3, 17, 32)] * 2
    graph = torch.fx.symbolic_trace(model.blocks[0], concrete_args={"attn_mask": None, "is_causal": False})
    tokens = torch.randn(2, 17, 32)
    with torch.no_grad():
        assert torch.equal(graph(tokens), model.blocks[0](tokens))


# masks


def test_masks() -> None:
    attention = swapped().blocks[0].attn
    x = torch.randn(2, 17, 32)
    seen = torch.ones(2, 1, 1, 17, dtype=torch.bool)
    seen[1, ..., 12:] = False
    with torch.no_grad():
        out = attention(x, attn_mask=seen)
        torch.testing.assert_close(attention(x, torch.zeros(17, 17)), attention(x))
        added = torch.zeros(2, 1, 17, 17).masked_fill(~seen, float("-inf"))
        torch.testing.assert_close(attention(x, added), out)
        changed = x.clone()
        changed[1, 12:] += 1
        torch.testing.assert_close(attention(changed, seen), out)
        assert not torch.allclose(attention(x)[1, :12], out[1, :12])
    with pytest.raises(ValueError, match=r"hides more than padding.*no option of the swap"):
        attention(x, torch.ones(17, 17, dtype=torch.bool).tril())
    documents = torch.block_diag(torch.ones(9, 9), torch.ones(8, 8)) != 0
    with pytest.raises(ValueError, match="a row of its own, with padding"):
        attention(x, documents)
    with pytest.raises(ValueError, match="is_causal=True"):
        attention(x, is_causal=True)
    with pytest.raises(ValueError, match=r"attn_mask must be \[N, N\]"):
        attention(x, torch.zeros(2, 4, 17, 17))


# others of that name


def test_other_attention_is_left() -> None:
    other = type("Attention", (nn.Module,), {"__module__": "somebody.model"})
    with pytest.raises(ValueError, match=r"Classes seen: somebody\.model\.Attention\."):
        swap_attention(nn.ModuleDict({"attn": other()}))
