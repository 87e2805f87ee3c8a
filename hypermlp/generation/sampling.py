"""Drawing the next token, and the rules that shape its distribution."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from hypermlp.checks import as_integer, check_kind, number, shown

# smallest temperature that float32 can divide by
_COLDEST = torch.finfo(torch.float32).tiny


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """``logits / temperature``: below 1 sharper, above 1 flatter."""
    check_kind("logits", logits, Tensor)
    _check_positive("temperature", temperature)
    return logits / temperature


def apply_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Keep the ``top_k`` likeliest tokens of each row ``[..., vocab_size]``, the others at -inf."""
    check_kind("logits", logits, Tensor)
    values, tokens = logits.topk(min(_as_top_k(top_k), logits.shape[-1]), dim=-1)
    return torch.full_like(logits, -torch.inf).scatter(-1, tokens, values)


def apply_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Keep the fewest likeliest tokens of each row whose probabilities reach ``top_p``.

    Nucleus sampling (Holtzman et al., arXiv 1904.09751); the likeliest token always stays.
    """
    check_kind("logits", logits, Tensor)
    _check_top_p(top_p)
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
    check_kind("logits", logits, Tensor)
    check_kind("seen", seen, Tensor)
    if seen.dtype != torch.bool:
        raise TypeError(f"seen must be bool, got {seen.dtype}")
    _check_positive("repetition_penalty", penalty)
    penalty = float(penalty)
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
    check_kind("logits", logits, Tensor)
    check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(-1)
    # below the largest logit, at 0, nothing overflows at any temperature: towards 0 the likeliest token stays alone
    logits = logits.float()
    logits = apply_temperature(logits - logits.amax(-1, keepdim=True), max(float(temperature), _COLDEST))
    if top_k is not None:
        logits = apply_top_k(logits, top_k)
    if top_p is not None:
        logits = apply_top_p(logits, top_p)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


def check_sampling(temperature: float, top_k: int | None, top_p: float | None, repetition_penalty: float = 1.0) -> None:
    """Whether :func:`sample` and :func:`apply_repetition_penalty` can take these."""
    if number(temperature) != 0:
        _check_positive("temperature", temperature)
    if top_k is not None:
        _as_top_k(top_k)
    if top_p is not None:
        _check_top_p(top_p)
    _check_positive("repetition_penalty", repetition_penalty)


def _check_positive(name: str, value: float) -> None:
    if not 0 < _as_number(name, value) <= sys.float_info.max:
        hint = "0 takes the likeliest token" if name == "temperature" else "1 changes nothing"
        raise ValueError(f"{name} must be positive and finite, got {shown(value)}; {hint}")


def _as_top_k(top_k: int) -> int:
    return as_integer("top_k", top_k, 1, "None for no limit")


def _check_top_p(top_p: float) -> None:
    if not 0 < _as_number("top_p", top_p) <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {shown(top_p)}; None for no limit")


def _as_number(name: str, value: object) -> float:
    found = number(value)
    if found is None:
        raise TypeError(f"{name} must be a number, got {value!r}")
    return found
