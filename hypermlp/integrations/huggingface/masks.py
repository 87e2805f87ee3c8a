"""What transformers' masks say of the tokens: which are padding, and where a packed document begins."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """The new tokens of a batch.

    Attributes:
        valid: bool ``[B, T]``, False for padding; None if all are valid.
        cu_seqlens: bounds of the documents in the batch flattened to one row, where rows hold
            several; else None.
    """

    valid: Tensor | None = None
    cu_seqlens: Tensor | None = None

    def flat(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """``x`` ``[B, T, ...]`` and the mask as one row."""
        return x.flatten(0, 1)[None], None if self.valid is None else self.valid.flatten()[None]


def read_mask(
    mask: Tensor | None, hidden_states: Tensor, past: int | Tensor, *, causal: bool, window: int | None
) -> Tokens:
    """The tokens that a mask describes.

    Args:
        mask: None for all visible tokens; ``[B, 1, T, S]``, bool (True is visible) or additive.
        hidden_states: the new tokens, ``[B, T, hidden_size]``.
        past: tokens in the cache before them.
        causal: whether the layer hides later tokens.
        window: tokens that the layer sees, itself included; None for all.

    Raises:
        ValueError: for a mask that shows or hides anything else than padding, other documents and
            later tokens: a hyper layer would not obey it.
    """
    if mask is None:
        return Tokens()
    batch, length = hidden_states.shape[:2]
    visible = _visible(mask, batch, length)
    rows = torch.arange(length, device=mask.device)
    own = visible[:, :, rows + past] if isinstance(past, Tensor) else visible.narrow(2, past, length)
    valid = own.diagonal(dim1=1, dim2=2)
    if length == 1:
        return Tokens(valid)
    begins = _begins(own, valid, rows) if causal else torch.zeros_like(valid)
    document = begins.cumsum(1)
    expected = (document[:, :, None] == document[:, None]) & valid[:, None]
    lag = rows[:, None] - rows
    if causal:
        expected &= lag >= 0
    differs = (own != expected) & valid[:, :, None]
    if window is not None:
        differs &= lag < window
    return _checked(valid, begins, differs, past)


def _checked(valid: Tensor, begins: Tensor, differs: Tensor, past: int | Tensor) -> Tokens:
    if torch.compiler.is_compiling():
        # where a document begins is data: a graph cannot depend on it, but it can refuse to be wrong
        torch._assert_async(
            ~(differs.any() | begins.any()), "packed sequences and custom masks need eager mode: do not compile"
        )
        return Tokens(valid)
    packed, unreadable, all_valid = torch.stack((begins.any(), differs.any(), valid.all())).tolist()
    if unreadable:
        raise ValueError(
            "attention_mask hides or shows tokens that a hyper layer cannot: only padding, packed documents and "
            "causality are understood, and a sliding window of at least max_lag tokens"
        )
    if packed and not (isinstance(past, int) and past == 0):
        raise ValueError("attention_mask: a new document begins among tokens that continue a cache: start a new cache")
    tokens = Tokens(None if all_valid else valid)
    if not packed:
        return tokens
    begins[:, 0] = True
    starts = begins.flatten().nonzero().flatten()
    return tokens._replace(cu_seqlens=torch.cat((starts, starts.new_tensor([begins.numel()]))))


def _visible(mask: Tensor, batch: int, length: int) -> Tensor:
    """Bool ``[B, T, S]``."""
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2] != length or mask.shape[0] not in (1, batch):
        raise ValueError(f"attention_mask must be [{batch}, 1, {length}, keys], got {tuple(mask.shape)}")
    if mask.is_floating_point():
        mask = mask > torch.finfo(mask.dtype).min / 2
    elif mask.dtype != torch.bool:
        raise TypeError(f"attention_mask must be bool or additive (floating point), got {mask.dtype}")
    return mask[:, 0].expand(batch, -1, -1)


def _begins(own: Tensor, valid: Tensor, rows: Tensor) -> Tensor:
    """Where a valid token does not see the valid one before it, bool ``[B, T]``."""
    latest = torch.where(valid, rows, -1).cummax(1).values
    before = torch.cat((torch.full_like(latest[:, :1], -1), latest[:, :-1]), dim=1)
    sees = own.gather(2, before.clamp_min(0)[:, :, None])[:, :, 0]
    return valid & (before >= 0) & ~sees
