"""Tiny ``torch.nn`` encoders with hyper layers, their inputs, and one comparison."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hypermlp import swap_attention

WIDTH, HEADS = 16, 4


def encoder(layers: int = 2, **options: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    options = {"dim_feedforward": 24, "dropout": 0.0, "batch_first": True} | options
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, **options)
    nested = options["batch_first"] and not options.get("norm_first") and options.get("bias", True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=nested).eval()


def swapped(causal: bool = False, **options: Any) -> nn.TransformerEncoder:
    model = encoder(**options)
    torch.manual_seed(1)
    swap_attention(model, causal=causal, max_lag=32)
    return model


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed))


def triangle(length: int) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(length)


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
