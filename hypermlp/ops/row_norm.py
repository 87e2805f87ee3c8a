"""The norm of a row of scores, whatever their size: squares overflow, or vanish, long before the norm does."""

from __future__ import annotations

import torch
from torch import Tensor

# Norms between these have exact squares, and leave room for the product with scale scores up to 2^80. Other rows are
# rare: they are computed in a unit of their own, a power of two, so that no digit of them changes with it.
_SMALL, _LARGE = 2.0**-40, 2.0**40


def is_extreme(rho: Tensor) -> Tensor:
    """Whether a row needs a unit of its own."""
    return (rho < _SMALL) | (rho > _LARGE)


def row_norms(x: Tensor, eps: float) -> Tensor:
    """``max(||x||_2, eps)`` along the last axis, without overflow or underflow."""
    norm = torch.linalg.vector_norm(x, dim=-1)
    largest = torch.linalg.vector_norm(x, ord=float("inf"), dim=-1).clamp_min_(eps)
    scaled = torch.linalg.vector_norm(x / largest.unsqueeze(-1), dim=-1) * largest
    return torch.where(is_extreme(norm), scaled, norm).clamp_min_(eps)


def row_units(rho: Tensor) -> Tensor:
    """The unit of rows with norm ``rho``: the power of two below it where it is extreme, else 1."""
    unit = rho / (2 * torch.frexp(rho).mantissa)
    return torch.where(is_extreme(rho) & torch.isfinite(rho), unit, 1)
