"""A keyword that a door has not is refused, and the one that may be meant is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import pytest
import torch
from torch import nn

from hypermlp import HyperConfig, HyperGLU, MixConfig, SoftmaxAttention, swap_attention
from hypermlp.checks import did_you_mean
from hypermlp.integrations import Host
from hypermlp.models import LanguageModel, LanguageModelConfig
from hypermlp_lab.training import TrainingConfig

CONFIG = HyperConfig(8, max_lag=4)
LAYER = HyperGLU(8, max_lag=4)
MODEL = LanguageModel(LanguageModelConfig(16, 8, 1, CONFIG))
X, IDS = torch.zeros(1, 3, 8), torch.zeros(1, 3, dtype=torch.long)
ENCODER = nn.TransformerEncoderLayer(8, 2)
# who is called, what it is given, what is meant
DOORS: list[tuple[Callable[[], Any], str, str, str]] = [
    (lambda: HyperGLU(8, max_lags=4), "HyperGLU", "max_lags", "max_lag"),
    (lambda: SoftmaxAttention(8, heads=4), "SoftmaxAttention", "heads", "num_heads"),
    (lambda: HyperConfig(8, num_head=2), "HyperConfig", "num_head", "num_heads"),
    (lambda: replace(CONFIG, max_lags=2), "HyperConfig", "max_lags", "max_lag"),
    (lambda: HyperConfig.from_label("S", 8, num_head=2), "HyperConfig", "num_head", "num_heads"),
    (lambda: MixConfig(ranks=2), "MixConfig", "ranks", "rank"),
    (lambda: HyperConfig(8, routing_mix={"ranks": 2}), "MixConfig", "ranks", "rank"),  # type: ignore[arg-type]
    (lambda: LanguageModelConfig(9, 8, 1, CONFIG, tie=True), "LanguageModelConfig", "tie", "tie_embeddings"),
    (lambda: TrainingConfig(9, batch=1), "TrainingConfig", "batch", "batch_size"),
    (lambda: Host(8, 2, max_len=4), "Host", "max_len", "max_length"),
    (lambda: LAYER(X, mask=None), "HyperGLU", "mask", "attention_mask"),
    (lambda: MODEL.blocks[0](X, caches=None), "TransformerBlock", "caches", "cache"),
    (lambda: MODEL(IDS, attn_mask=None), "LanguageModel", "attn_mask", "attention_mask"),
    (lambda: swap_attention(ENCODER, layer=[0]), "swap_attention", "layer", "layers"),
    (lambda: swap_attention(ENCODER, max_lags=4), "swap_attention", "max_lags", "max_lag"),
]


@pytest.mark.parametrize(("call", "caller", "given", "meant"), DOORS)
def test_a_misspelt_keyword_names_the_one_that_is_meant(
    call: Callable[[], Any], caller: str, given: str, meant: str
) -> None:
    with pytest.raises(TypeError, match=rf"^{caller} takes no '{given}': did you mean {meant}\?$"):
        call()


def test_a_name_like_no_other_is_told_what_there_is() -> None:
    with pytest.raises(TypeError, match=r"no 'bucket': it takes hidden_states, attention_mask, cu_seqlens and cache$"):
        LAYER(X, bucket=1)
    with pytest.raises(TypeError, match=r"no 'ratio': it takes rank, diag and identity$"):
        MixConfig(ratio=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("max_lags", "did you mean max_lag?"),
        ("dim", "did you mean qk_dim or v_dim?"),
        ("mix", "did you mean mix_rank?"),
        ("mixer", ""),  # is like mix_rank, and another thing
        ("as", ""),  # is in bias, and no word of it
        ("", ""),
    ],
)
def test_names_are_alike_by_letters_or_by_words(name: str, meant: str) -> None:
    assert did_you_mean(name, ("max_lag", "qk_dim", "v_dim", "mix_rank", "bias")) == meant


def test_a_subclass_says_what_its_own_call_takes() -> None:
    class Scaled(HyperGLU):
        def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:  # type: ignore[override]
            return super().forward(x) * scale

    class Open(HyperGLU):
        def forward(self, x: torch.Tensor, **others: Any) -> torch.Tensor:  # type: ignore[override]
            return x

    layer = Scaled(8, max_lag=4)
    assert torch.equal(layer(X + 1, scale=2.0), 2 * layer(X + 1))
    with pytest.raises(TypeError, match=r"Scaled takes no 'scales': did you mean scale\?"):
        layer(X, scales=2.0)
    assert Open(8, max_lag=4)(X, anything=1) is X


def by_two(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A wrapper that takes a keyword of its own."""

    @wraps(forward)
    def scaled(*args: Any, scale: float = 1.0, **others: Any) -> torch.Tensor:
        return forward(*args, **others) * scale

    return scaled


def test_a_forward_that_is_put_in_its_place_says_what_it_takes() -> None:
    class Patched(HyperGLU):
        pass

    class Wrapped(HyperGLU):
        forward = by_two(HyperGLU.forward)  # type: ignore[assignment]

    one = HyperGLU(8, max_lag=4)
    one.forward = by_two(one.forward)  # type: ignore[method-assign]
    Patched.forward = by_two(HyperGLU.forward)  # type: ignore[method-assign]
    for layer in (one, Patched(8, max_lag=4), Wrapped(8, max_lag=4)):
        assert torch.equal(layer(X + 1, scale=2.0), 2 * layer(X + 1))
    Patched.forward = HyperGLU.forward  # type: ignore[method-assign]
    with pytest.raises(TypeError, match=r"Patched takes no 'mask': did you mean attention_mask\?"):
        Patched(8, max_lag=4)(X, mask=None)


@pytest.mark.parametrize("patched", [False, True])
def test_keywords_of_such_a_call_are_compiled(patched: bool) -> None:
    class Open(HyperGLU):
        def forward(self, x: torch.Tensor, **others: float) -> torch.Tensor:  # type: ignore[override]
            return super().forward(x) * others["scale"]

    layer = HyperGLU(8, max_lag=4) if patched else Open(8, max_lag=4)
    if patched:
        layer.forward = by_two(layer.forward)  # type: ignore[method-assign]
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X + 1, scale=2.0), layer(X + 1, scale=2.0))


def test_a_hook_may_take_keywords_of_its_own() -> None:
    layer = HyperGLU(8, max_lag=4)
    layer.register_forward_pre_hook(lambda _, args, kwargs: ((kwargs["x"],), {}), with_kwargs=True)
    assert torch.equal(layer(x=X + 1), HyperGLU.forward(layer, X + 1))


def test_a_call_without_keywords_says_so() -> None:
    class Bare(HyperGLU):
        def forward(self, *args: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return args[0]

    with pytest.raises(TypeError, match=r"^Bare takes no 'args': it takes no keyword$"):
        Bare(8, max_lag=4)(args=X)


def test_a_compiled_layer_says_so_too() -> None:
    layer = HyperGLU(8, max_lag=4)
    layer.compile(backend="eager")
    assert layer(X, attention_mask=None).shape == X.shape
    with pytest.raises(TypeError, match=r"did you mean attention_mask\?"):
        layer(X, mask=None)
