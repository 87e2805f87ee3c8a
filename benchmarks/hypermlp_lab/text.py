"""Bytes as tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def encode(text: str) -> Tensor:
    """UTF-8 bytes as tokens, int64 ``[1, T]``.

    Bytes of the command line that are no UTF-8, which Python keeps as lone surrogates
    (``surrogateescape``, PEP 383), are taken as the bytes they were.
    """
    return torch.tensor([list(text.encode(errors="surrogateescape"))], dtype=torch.int64)


def decode(tokens: Tensor) -> str:
    """Text of byte tokens ``[T]``; bytes that are no UTF-8 become the replacement character."""
    return bytes(tokens.tolist()).decode(errors="replace")
