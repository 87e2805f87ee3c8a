"""Depthwise causal convolution over a few tokens (paper: KV convolution)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypermlp.ops.varlen import sequence_starts

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

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, past: Tensor | None = None) -> Tensor:
        """``[B, T, channels]`` to the same shape; taps never reach into another packed sequence.

        Padded tokens must hold zeros (``x`` of a layer does). ``past`` is the ``size - 1`` tokens
        before the first, ``[B, size - 1, channels]``; None for zeros.
        """
        length, taps = x.shape[1], self.taps
        padded = F.pad(x, (0, 0, self.size - 1, 0)) if past is None else torch.cat((past, x), dim=1)
        y = x * taps[:, -1]
        position = None
        if cu_seqlens is not None:
            position = torch.arange(length, device=x.device) - sequence_starts(length, cu_seqlens, x.device)
        for reach in range(1, self.size):
            start = self.size - 1 - reach
            tap = padded[:, start : start + length]
            if position is not None:
                tap = torch.where((position >= reach)[:, None], tap, 0)
            y = torch.addcmul(y, tap, taps[:, -1 - reach])
        return y

    def step(self, window: Tensor) -> Tensor:
        """The newest token's output ``[B, channels]`` from the last ``size`` inputs ``[B, size, channels]``."""
        return (window * self.taps.mT).sum(1)

    def extra_repr(self) -> str:
        return f"{self.channels}, size={self.size}, identity={self.identity}"
