"""A keyword that a door has not is refused, and the one that may be meant is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from hypermlp import HyperConfig, HyperGLU, MixConfig, SoftmaxAttention, swap_attention
from hypermlp.checks import did_you_mean
from hypermlp.generation import generate
from hypermlp.integrations import Host
from hypermlp.integrations.hosts.timm import timm_attention
from hypermlp.models import LanguageModel, LanguageModelConfig
from hypermlp_lab.training import TrainingConfig

CONFIG = HyperConfig(8, max_lag=4)
MODEL = LanguageModel(LanguageModelConfig(16, 8, 1, CONFIG))
IDS = torch.zeros(1, 3, dtype=torch.long)
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
    (lambda: timm_attention(max_lags=4), "timm_attention", "max_lags", "max_lag"),
    (lambda: generate(MODEL, IDS, 1, temp=1.0), "generate", "temp", "temperature"),
    (lambda: generate(MODEL, IDS, 1, do_sample=False), "generate", "do_sample", "temperature, top_k or top_p"),
    (lambda: generate(MODEL, IDS, 1, num_return_sequences=2), "generate", "num_return_sequences", "num_samples"),
    (lambda: LanguageModelConfig(9, 8, n_layer=1), "LanguageModelConfig", "n_layer", "num_layers"),
    (lambda: HyperConfig(d_model=8), "HyperConfig", "d_model", "hidden_size"),
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
    with pytest.raises(TypeError, match=r"no 'ratio': it takes rank, diag and identity$"):
        MixConfig(ratio=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("max_lags", "did you mean max_lag?"),
        ("dim", "did you mean qk_dim or v_dim?"),
        ("mix", "did you mean mix_rank?"),
        ("rank", "did you mean mix_rank?"),
        ("bi", ""),  # two letters say little
        ("mixer", ""),  # is like mix_rank, and another thing
        ("as", ""),  # is in bias, and no word of it
        ("", ""),
    ],
)
def test_names_are_alike_by_letters_or_by_words(name: str, meant: str) -> None:
    assert did_you_mean(name, ("max_lag", "qk_dim", "v_dim", "mix_rank", "bias")) == meant
