"""Depthwise causal convolution over a few tokens (paper: KV convolution)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hypermlp.ops.attention import Backend
from hypermlp.ops.short_conv import short_conv

# standard deviation of the taps, from the authors' implementation
_TAP_STD = 0.02


class ShortConv(nn.Module):
    """``y_t = sum_s weight[:, -1 - s] * x_{t-s}``, ``s`` from 0 to ``size - 1``, no bias, no activation.

    Args:
        channels: width of the input.
        size: taps; the last one is the current token's.
        identity: start near the identity, else near zero as in the authors' implementation.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        *,
        identity: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels, self.size, self.identity = channels, size, identity
        self.weight = nn.Parameter(torch.empty(channels, size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=_TAP_STD)
        if self.identity:
            nn.init.normal_(self.weight[:, -1], mean=1.0, std=_TAP_STD)

    @property
    def taps(self) -> Tensor:
        """The weights as they are used, ``[channels, size]``."""
        return self.weight

    def forward(
        self,
        x: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        past: Tensor | None = None,
        backend: Backend = "auto",
        newest: bool = False,
    ) -> Tensor:
        """``[B, T, channels]`` to the same shape, by :func:`hypermlp.ops.short_conv.short_conv`.

        Args:
            x: ``[B, T, channels]``; padded tokens hold zeros.
            cu_seqlens, past, backend: as there.
            newest: ``x`` is one token's window, the last ``size`` inputs up to it ``[B, size, channels]``: return
                that token's output alone, ``[B, channels]``.
        """
        if newest:
            return (x * self.taps.mT).sum(1)
        return short_conv(x, self.taps, cu_seqlens, past, backend)

    def extra_repr(self) -> str:
        return f"{self.channels}, size={self.size}, identity={self.identity}"
