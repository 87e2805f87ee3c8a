"""Vision models of transformers with hyper layers: calls, other image sizes, maps, saving, training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from hypermlp import restore_attention, swap_attention
from hypermlp.integrations import resize_positions
from hypermlp.integrations.huggingface import attention
from hypermlp.integrations.huggingface.attention import HuggingFaceAttention
from tests.hf_names import set_checkpointing
from tests.integrations.huggingface.checks import TOLERANCE, attentions, check_same_weights, error

_SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "image_size": 16, "patch_size": 4, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
# class, and tokens of a 16 x 16 image
KINDS = {
    "ViT": 16 + 1,
    "ViTMSN": 16 + 1,
    "DeiT": 16 + 2,
    "Dinov2": 16 + 1,
    "Dinov2WithRegisters": 16 + 1 + 4,
}


def stock(kind: str = "ViT", seed: int = 0, attn: str = "sdpa", **options: Any) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(**(_SIZES | options))
    config._attn_implementation = attn
    torch.manual_seed(seed)
    model: nn.Module = getattr(transformers, f"{kind}ForImageClassification")(config).eval()
    if not any(name.endswith("attention.q_proj") for name, _ in model.named_modules()):
        pytest.skip(f"transformers {transformers.__version__} builds {kind} otherwise: it is told to upgrade")
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.double()  # rounding differs between machines
        if parameter.ndim > 1 or "bias" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def swapped(kind: str = "ViT", *, mixer: str = "hyperglu", attn: str = "sdpa", **options: Any) -> nn.Module:
    model = stock(kind, attn=attn)
    swap_attention(model, mixer, **options)
    return model


def images(batch: int = 3, side: int = 16) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def logits(model: nn.Module, pixels: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(pixels, **kwargs).logits
    return out


def check_called(model: nn.Module) -> None:
    """Every layer once a forward, and each image is what it is alone."""
    calls: list[nn.Module] = []
    handles = [a.mixer.register_forward_hook(lambda module, *_: calls.append(module)) for a in attentions(model)]
    for batch in (1, 2, 3):
        pixels = images(batch)
        calls.clear()
        out = logits(model, pixels)
        assert calls == [a.mixer for a in attentions(model)]
        assert error(out, torch.cat([logits(model, pixels[n : n + 1]) for n in range(batch)])) < TOLERANCE
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_called(kind: str, attn: str) -> None:
    model = swapped(kind, attn=attn)
    assert [a.mixer.config.max_lag for a in attentions(model)] == [KINDS[kind]] * 2
    check_called(model)


def test_a_bare_tensor_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = swapped()
    forward = HuggingFaceAttention.forward
    monkeypatch.setattr(HuggingFaceAttention, "forward", lambda *args, **kwargs: forward(*args, **kwargs)[0])
    with pytest.raises((AssertionError, ValueError, RuntimeError, IndexError)):
        check_called(model)


def check_sees_everything(model: nn.Module) -> None:
    """The class token, which is the first, and every patch depend on the last patch."""
    a, b = images(1), images(1)
    b[:, :, -4:, -4:] = 1.0
    with torch.no_grad():
        hidden = [model.vit(x, output_hidden_states=True).hidden_states[1] for x in (a, b)]
    assert ((hidden[0] - hidden[1]).abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize("mixer", ["hyperglu", "hypermlp", "relu", "softmax"])
def test_every_token_sees_every_other(mixer: str) -> None:
    check_sees_everything(swapped(mixer=mixer))


def test_a_causal_layer_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from hypermlp.integrations.hosts.vit import ViTAdapter

    describe = ViTAdapter.describe
    monkeypatch.setattr(
        ViTAdapter,
        "describe",
        lambda *args: (lambda host: host.__class__(**(vars(host) | {"causal": True})))(describe(*args)),
    )
    with pytest.raises(AssertionError):
        check_sees_everything(swapped())


@pytest.mark.parametrize("kind", KINDS)
def test_softmax_from_attention_is_the_host(kind: str) -> None:
    model = stock(kind)
    pixels = images()
    out = logits(model, pixels)
    swap_attention(model, "softmax", init="from_attention")
    torch.testing.assert_close(logits(model, pixels), out, rtol=1e-10, atol=1e-10)
    restore_attention(model)
    assert torch.equal(logits(model, pixels), out)
    swap_attention(model, "softmax")
    assert not torch.allclose(logits(model, pixels), out)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_maps(attn: str) -> None:
    model = swapped(attn=attn)
    with torch.no_grad():
        out = model(images(), output_attentions=True)
    assert [tuple(weights.shape) for weights in out.attentions] == [(3, 2, 17, 17)] * 2
    assert error(out.logits, logits(model, images())) < TOLERANCE
    assert torch.stack(out.attentions).isfinite().all()
    assert (torch.stack(out.attentions).abs().amax((0, 1, 2, 3)) > 0).any()


# other image sizes


def check_another_size_is_refused(model: nn.Module) -> None:
    for side in (12, 24):
        with pytest.raises(ValueError, match=r"resize_positions\(model, \(height, width\)\)"):
            logits(model, images(side=side), interpolate_pos_encoding=True)


def test_another_size_is_refused() -> None:
    check_another_size_is_refused(swapped())
    # nothing of theirs is bound to a place
    logits(swapped(mixer="relu"), images(side=24), interpolate_pos_encoding=True)


def test_a_layer_that_takes_any_size_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hypermlp.integrations.hosts.vit.fit_grid", lambda layer: None)
    with pytest.raises(pytest.fail.Exception):
        check_another_size_is_refused(swapped())


@pytest.mark.parametrize("kind", ["ViT", "Dinov2WithRegisters"])
@pytest.mark.parametrize("side", [12, 24])
def test_resized_it_runs_and_saves(kind: str, side: int, tmp_path: Path) -> None:
    from hypermlp.integrations.huggingface import from_pretrained

    model = swapped(kind)
    prefix, grid = KINDS[kind] - 16, side // 4
    assert resize_positions(model, (grid, grid), prefix_tokens=prefix) == 2
    kwargs = {"interpolate_pos_encoding": True} if kind == "ViT" else {}
    out = logits(model, images(side=side), **kwargs)
    assert out.isfinite().all()
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path).eval()
    check_same_weights(again, model)
    assert error(logits(again, images(side=side), **kwargs), out) < TOLERANCE
    resize_positions(copy.deepcopy(model), (4, 4), prefix_tokens=prefix)


# saving and training


def test_saved_and_opened(tmp_path: Path) -> None:
    from hypermlp.integrations.huggingface import from_pretrained

    model = swapped()
    model.save_pretrained(tmp_path)
    again, info = from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    check_same_weights(again, model)
    assert error(logits(again.eval(), images()), logits(model, images())) < TOLERANCE
    check_another_size_is_refused(again)


def check_gradients(model: nn.Module) -> dict[str, Tensor]:
    model.train()
    model(images(), labels=torch.tensor([0, 1, 0])).loss.backward()
    grads = {}
    for name, parameter in model.named_parameters():
        # a mask token, where there is one, is for another task
        if "mask_token" in name:
            continue
        assert parameter.grad is not None, f"{name} has no gradient"
        assert parameter.grad.isfinite().all()
        grads[name] = parameter.grad.clone()
    return grads


@pytest.mark.parametrize("kind", ["ViT", "Dinov2WithRegisters"])
def test_gradients(kind: str) -> None:
    model = swapped(kind)
    plain = check_gradients(model)
    model.zero_grad()
    set_checkpointing(model)
    for name, grad in check_gradients(model).items():
        torch.testing.assert_close(grad, plain[name], rtol=1e-9, atol=1e-9)


def test_a_detached_layer_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    call = attention.call_layer
    monkeypatch.setattr(attention, "call_layer", lambda *args, **wanted: (call(*args, **wanted)[0].detach(), None))
    with pytest.raises(AssertionError, match="has no gradient"):
        check_gradients(swapped())


def test_compiles_whole() -> None:
    model = swapped()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert error(compiled(images()).logits, logits(model, images())) < TOLERANCE


def test_an_older_build_is_told_to_upgrade() -> None:
    model = stock()
    del model.vit.layers[0].attention.q_proj
    with pytest.raises(ValueError, match="upgrade transformers"):
        swap_attention(model)
