"""Tiny random models of the Hugging Face family, of which generation is not trivial."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers", minversion="5.5", reason="the Hugging Face family needs the extra hf")

import torch
from torch import Tensor

from hypermlp.config import HyperConfig
from hypermlp.models.huggingface import HyperMLPConfig, HyperMLPForCausalLM

VOCAB, PAD = 37, 0
# a window shorter than what is generated, rotation, tables, two kinds of score maps, and plain softmax
ATTENTION: dict[str, dict[str, Any]] = {
    "hyperglu": HyperConfig.from_label("G-cg-q-12o", 16, max_lag=11, mix_rank=3).to_dict(),
    "hypermlp": HyperConfig.from_label("R-pcg-12o", 16, max_lag=64, mix_rank=2).to_dict(),
    "relu": HyperConfig.from_label("R-c", 16, max_lag=9).to_dict(),
    "softmax": HyperConfig.from_label("S-pc", 16).to_dict(),
}


def tiny_config(mixer: str = "hyperglu", **options: Any) -> HyperMLPConfig:
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24}
    defaults = sizes | {"attention": ATTENTION[mixer], "pad_token_id": PAD, "tie_word_embeddings": False}
    return HyperMLPConfig(**(defaults | options))


def tiny(mixer: str = "hyperglu", seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A model whose branches weigh as much as its residual stream, so that every part shows in the tokens."""
    torch.manual_seed(seed)
    model = HyperMLPForCausalLM(tiny_config(mixer, **options)).to(dtype).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                p.mul_(6)
            elif "q_proj" in name:
                p.mul_(4)
            elif "conv" in name or "mix" in name:  # away from the near-zeros of the start
                p.add_(0.3 * torch.randn_like(p))
    return model


def assert_same_weights(model: Any, other: Any) -> None:
    """Bit for bit. Outputs of equal weights may differ by rounding: memory from a file is aligned otherwise."""
    state, expected = model.state_dict(), other.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Prompts aligned at their ends, with random tokens (not the pad token) before them, and the mask."""
    width = max(lengths)
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return tokens(len(lengths), width, seed), mask
