"""Masks of ``torch.nn`` where their values cannot be read: samples of vmap, exported and compiled calls."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.integrations.torch_nn.encoders import inputs, same, swapped, triangle

PADDING = torch.tensor([[False] * 4 + [True] * 2, [False] * 6])


class Causal(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = swapped(causal=True).requires_grad_(False)

    def forward(self, x: Tensor, mask: Tensor, padding: Tensor) -> Tensor:
        return self.model.layers[0].self_attn(x, x, x, key_padding_mask=padding, attn_mask=mask, need_weights=False)[0]


def test_masks_under_vmap_export_and_compile() -> None:
    torch._dynamo.reset()
    call, args = Causal(), (inputs(2, 6), triangle(6), PADDING)
    expected = call(*args)
    samples = torch.func.vmap(call)(*(torch.stack((x, x)) for x in args))
    for found in samples:
        same(found, expected)
    same(torch.export.export(call, args).module()(*args), expected)
    same(torch.compile(call, backend="aot_eager", fullgraph=True)(*args), expected)


def test_a_mask_that_is_not_obeyed_is_refused_for_any_sample() -> None:
    torch._dynamo.reset()
    call, x, full = Causal(), inputs(2, 6), torch.zeros(6, 6)
    bad = torch.stack((triangle(6), full))
    with pytest.raises(ValueError, match="attn_mask shows later tokens"):
        torch.func.vmap(call, in_dims=(None, 0, None))(x, bad, PADDING)
    program = torch.export.export(call, (x, triangle(6), PADDING)).module()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for run in (program, compiled):
        with pytest.raises(RuntimeError, match="attn_mask shows later tokens"):
            run(x, full, PADDING)
