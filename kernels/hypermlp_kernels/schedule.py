"""Which rows a program computes when a batch holds padding or packed sequences. Never waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor


def sequences(
    attention_mask: Tensor | None, cu_seqlens: Tensor | None, batch: int, length: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch row, first token and number of tokens of each sequence, padding at its ends trimmed: int64 ``[N]``.

    Tokens outside the bounds are padding. Nobody may have read the bounds: memory outside the tensors is never named.
    """
    if cu_seqlens is None:
        bounds = torch.tensor([0, length], device=device)
    else:
        bounds = cu_seqlens.to(device=device, dtype=torch.long).clamp(0, length)
    per_row = bounds.shape[0] - 1
    row = torch.arange(batch, device=device).repeat_interleave(per_row)
    start, stop = bounds[:-1].repeat(batch), bounds[1:].repeat(batch)
    if attention_mask is not None:
        token = torch.arange(length, device=device)
        after = torch.searchsorted(bounds, token, right=True)
        valid = attention_mask & (after > 0) & (after <= per_row)
        sequence = (after - 1).clamp(0, per_row - 1) + per_row * torch.arange(batch, device=device)[:, None]
        first = torch.where(valid, token, length).flatten()
        last = torch.where(valid, token + 1, 0).flatten()
        start = torch.full_like(start, length).scatter_reduce(0, sequence.flatten(), first, reduce="amin")
        stop = torch.zeros_like(stop).scatter_reduce(0, sequence.flatten(), last, reduce="amax")
    return row, start, (stop - start).clamp_min(0)


def count_blocks(found: tuple[Tensor, Tensor, Tensor], batch: int, length: int, rows: int) -> int:
    """As many blocks of ``rows`` rows as there could be."""
    return batch * (length // rows) + found[0].shape[0]


def block_table(found: tuple[Tensor, Tensor, Tensor], batch: int, length: int, rows: int) -> Tensor:
    """``[blocks, 4]`` int32: batch row, first token, tokens of the sequence, first row of the block in it.

    There are as many blocks as there could be; those left over start past their sequence.
    """
    row, start, tokens = found
    per_sequence = (tokens + rows - 1) // rows
    ends = per_sequence.cumsum(0)
    block = torch.arange(count_blocks(found, batch, length, rows), device=row.device)
    sequence = torch.searchsorted(ends, block, right=True).clamp_max(row.shape[0] - 1)
    first_row = (block - (ends - per_sequence)[sequence]) * rows
    return torch.stack((row[sequence], start[sequence], tokens[sequence], first_row), dim=1).to(torch.int32)
