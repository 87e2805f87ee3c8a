"""Drawing the next token, and the rules that shape its distribution."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """``logits / temperature``: below 1 sharper, above 1 flatter."""
    if not temperature > 0:
        raise ValueError(f"temperature must be positive here, got {temperature!r}")
    return logits / temperature


def apply_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Keep the ``top_k`` likeliest tokens of each row ``[..., vocab_size]``, the others at -inf."""
    if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
        raise ValueError(f"top_k must be a positive integer, got {top_k!r}; None for no limit")
    values, tokens = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
    return torch.full_like(logits, -torch.inf).scatter(-1, tokens, values)


def apply_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Keep the fewest likeliest tokens of each row whose probabilities reach ``top_p``.

    Nucleus sampling (Holtzman et al., arXiv 1904.09751); the likeliest token always stays.
    """
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p!r}; None for no limit")
    ordered, tokens = logits.sort(dim=-1, descending=True, stable=True)
    probability = ordered.float().softmax(-1)
    before = probability.cumsum(-1) - probability
    dropped = before >= top_p
    dropped[..., 0] = False
    return torch.full_like(logits, -torch.inf).scatter(-1, tokens, ordered.masked_fill(dropped, -torch.inf))


def apply_repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that have come before less likely (Keskar et al., arXiv 1909.05858, section 4.1).

    Args:
        logits: ``[B, vocab_size]``.
        seen: bool ``[B, vocab_size]``, the tokens of each row so far.
        penalty: divides positive logits and multiplies negative ones; 1 changes nothing.
    """
    if not penalty > 0:
        raise ValueError(f"repetition_penalty must be positive, got {penalty!r}; 1 changes nothing")
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token of each row.

    Args:
        logits: ``[B, vocab_size]``.
        temperature: 0 takes the likeliest token.
        top_k, top_p: see :func:`apply_top_k`, :func:`apply_top_p`, in this order after the temperature.
        generator: source of randomness, on the logits' device.

    Returns:
        int64 ``[B]``.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = apply_temperature(logits.float(), temperature)
    if top_k is not None:
        logits = apply_top_k(logits, top_k)
    if top_p is not None:
        logits = apply_top_p(logits, top_p)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
