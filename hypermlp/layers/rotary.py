"""Rotary position embedding, the standard rotation (rotate-half pairing)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, theta: float, offset: int | Tensor = 0) -> Tensor:
    """Turn channel pairs ``(c, c + K/2)`` of ``[B, T, heads, K]`` by ``(offset + t) * theta^(-2c/K)``.

    ``offset`` is one for all, or broadcasts to ``[B, T]``. Angles are made in float32, or float64 for
    such an input; nothing is cached, so there is no buffer to lose when a model is built without
    memory.
    """
    length, width = x.shape[1], x.shape[-1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    frequency = theta ** (-torch.arange(0, width, 2, device=x.device, dtype=dtype) / width)
    position = torch.arange(length, device=x.device, dtype=dtype) + offset
    angle = (position[..., None] * frequency)[..., None, :]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
