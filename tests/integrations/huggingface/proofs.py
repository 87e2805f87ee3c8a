"""What is proven of a host, each as a function that raises AssertionError where it does not hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from hypermlp import build_layer, swap_attention
from hypermlp.integrations.huggingface import from_pretrained
from hypermlp.integrations.sites import find_sites, swaps_in
from tests.integrations.huggingface import checks
from tests.integrations.huggingface.families import HOSTS, inputs, stock, tokens

# hosts whose length nothing says
UNBOUNDED = {"wav2vec2": 16, "hubert": 16, "t5": 32, "mt5": 32}
# what init="from_attention" is refused for, by a word of the reason
REFUSED = {
    **dict.fromkeys(("qwen3", "qwen3_moe", "gemma3", "olmo2", "olmo3", "exaone4", "hunyuan", "apertus"), "normalises"),
    "gemma2": "caps its scores",
    **dict.fromkeys(("bloom", "falcon_alibi"), "ALiBi"),
    **dict.fromkeys(("mpnet", "t5", "mt5"), "relative position"),
}  # fmt: skip
# hosts whose angles a hyper layer has not (partial, scaled, of two dimensions): the layer starts without
UNROTATED = {"phi", "stablelm", "glm", "glm4", "nemotron", "gptj", "codegen", "gpt_neox", "dinov3"}


def swapped(name: str, mixer: str = "hyperglu", *, host: dict[str, Any] | None = None, **options: Any) -> Any:
    model = stock(name, **(host or {}))
    if name in UNBOUNDED and mixer in ("hyperglu", "hypermlp"):
        options = {"max_lag": UNBOUNDED[name], **options}
    swap_attention(model, mixer, **options)
    return model


def outputs(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """Logits, or hidden states where a model has no head."""
    with torch.no_grad():
        made: Any = model(**given)
    found: Tensor = made.logits if "logits" in made else made.last_hidden_state
    return found


def check_values(name: str) -> None:
    """As the host with a separate layer of the reference path called in each place."""
    model, plain = swapped(name), stock(name)
    for site in find_sites(model)[0]:
        assert site.replaced is not None
        layer = build_layer(site.replaced.config, backend="reference").double().eval()
        if not hasattr(site.replaced.layer.o_proj, "weight"):
            layer.o_proj = nn.Identity()  # type: ignore[assignment]
        layer.load_state_dict(site.replaced.layer.state_dict())
        _call_instead(plain.get_submodule(site.names[0]), layer)
    given = inputs(name)
    expected = outputs(plain, given)
    assert expected.isfinite().all()
    assert checks.error(outputs(model, given), expected) < checks.TOLERANCE
    assert checks.error(outputs(stock(name), given), expected) > 1e-3, "the layers make no difference"


def _call_instead(module: Any, layer: nn.Module) -> None:
    def forward(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        x = args[0] if args else kwargs["hidden_states"]
        out, kind = layer(x), type(module).__name__
        if kind == "AlbertAttention":
            out = module.LayerNorm(x + out)
        if kind == "BloomAttention":
            out = args[1] + out
        return (out, kwargs["position_bias"], None) if kind in ("T5Attention", "MT5Attention") else (out, None)

    module.forward = forward  # type: ignore[method-assign]


def check_from_attention(name: str) -> str:
    """A softmax layer that starts from the host's projections is the host; returns how far, in words."""
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]) as error:
            swapped(name, init="from_attention")
        return f"refused: {str(error.value).partition('this host (')[2].partition('): use')[0]}"
    plain, given = stock(name), inputs(name)
    if name in UNROTATED:
        _do_not_rotate(plain, sin_first=name in ("gptj", "codegen"))
    model = swapped(name, "softmax", init="from_attention")
    expected = outputs(plain, given)
    # hosts have angles and norms in float32
    assert checks.error(outputs(model, given), expected) < 1e-5 * max(1.0, float(expected.abs().max()))
    return "yes, without its angles" if name in UNROTATED else "yes"


def _do_not_rotate(model: nn.Module, *, sin_first: bool) -> None:
    def still(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if "position_embeddings" not in kwargs:
            pytest.skip("this release makes its angles within its attention")
        cos, sin = kwargs["position_embeddings"]
        one, zero = torch.ones_like(cos), torch.zeros_like(sin)
        return args, kwargs | {"position_embeddings": (zero, one) if sin_first else (one, zero)}

    for site in find_sites(model)[0]:
        site.module.register_forward_pre_hook(still, with_kwargs=True)


def check_cache(name: str) -> None:
    """Token by token as all at once, and the same tokens with and without a cache."""
    model = swapped(name)
    if HOSTS[name].kind == "pair":
        given = {key: value for key, value in inputs(name).items() if key != "decoder_input_ids"}
        with_cache, without = (_generated(model, given, use_cache=use) for use in (True, False))
        assert torch.equal(with_cache, without)
        return
    checks.check_stepwise(model)
    checks.check_generate(model, "greedy")


def _generated(model: Any, given: dict[str, Tensor], **options: Any) -> Tensor:
    # Whisper's own generate sets options that transformers deprecates
    out: Tensor = transformers.GenerationMixin.generate(
        model, **given, max_new_tokens=8, min_new_tokens=8, do_sample=False, num_beams=1, **options
    )
    return out


def check_padding(name: str) -> None:
    """What stands under the mask changes nothing, on either side."""
    if HOSTS[name].kind == "sound":
        _check_padded_sound(name)
        return
    model = swapped(name)
    if HOSTS[name].kind == "decoder":
        checks.check_padding(model, "left")
        checks.check_padding(model, "right")
        checks.check_generate_padded(model)
        return
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    other = torch.where(mask == 1, ids, tokens(2, 9, seed=9))
    pair = {"decoder_input_ids": tokens(2, 7)} if HOSTS[name].kind == "pair" else {}
    a, b = (outputs(model, {"input_ids": x, "attention_mask": mask, **pair}) for x in (ids, other))
    kept = torch.ones_like(a[..., 0], dtype=torch.bool) if pair else mask == 1
    assert checks.error(a[kept], b[kept]) < checks.TOLERANCE
    alone = outputs(model, {"input_ids": ids[:1, :6], **{key: value[:1] for key, value in pair.items()}})
    assert checks.error(a[:1] if pair else a[:1, :6], alone) < checks.TOLERANCE


def _check_padded_sound(name: str) -> None:
    """With the norm of each place alone: a front end that normalises a whole sound reads its padding, stock too."""
    model, sound = swapped(name, host={"feat_extract_norm": "layer"}), inputs(name)["input_values"]
    mask = torch.ones_like(sound, dtype=torch.long)
    mask[1, 40:] = 0
    other = torch.where(mask == 1, sound, torch.flip(sound, (0, 1)))
    a, b = (outputs(model, {"input_values": x, "attention_mask": mask})[1:] for x in (sound, other))
    alone = outputs(model, {"input_values": sound[1:, :40]})
    length = alone.shape[1]
    assert 0 < length < a.shape[1]
    assert checks.error(a[:, :length], b[:, :length]) < checks.TOLERANCE
    assert checks.error(a[:, :length], alone) < checks.TOLERANCE


def check_packed(name: str) -> str:
    """Documents in one row are apart, or the host does not keep them apart either; returns which, in words."""
    try:
        checks.check_packed(swapped(name))
    except AssertionError:
        with pytest.raises(AssertionError):
            checks.check_packed(stock(name))
        return "the host has none"
    return "yes"


def check_saved(name: str, folder: Path) -> None:
    """Saved, opened and the same, to the bit in its weights."""
    model = swapped(name)
    model.save_pretrained(folder)
    again = from_pretrained(folder, experts_implementation="eager").eval()
    checks.check_same_weights(again, model)
    assert swaps_in(again) == swaps_in(model)
    expected = outputs(model, inputs(name))
    # buffers in float32 are made anew
    assert checks.error(outputs(again, inputs(name)), expected) < 1e-5 * max(1.0, float(expected.abs().max()))


def check_trains(name: str) -> None:
    """Every parameter of the new layers has a gradient."""
    model = swapped(name).train()
    made = model(**inputs(name))
    (made.logits if "logits" in made else made.last_hidden_state).square().mean().backward()
    for site in find_sites(model)[0]:
        assert site.replaced is not None
        for key, parameter in site.replaced.layer.named_parameters():
            assert parameter.grad is not None, f"{site.names[0]}: {key} has no gradient"
            assert parameter.grad.isfinite().all()
            assert key.endswith("down") or bool(parameter.grad.any()), f"{site.names[0]}: {key} has a zero gradient"
