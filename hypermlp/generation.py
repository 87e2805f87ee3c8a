"""Sampling from a language model, and the rules that shape the next token's distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from hypermlp.models import LanguageModel


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


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt_ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> Tensor:
    """Continue each prompt.

    Every token is computed from the last ``model.config.context_length`` ones anew.

    Args:
        model: is put into evaluation mode meanwhile.
        prompt_ids: int64 ``[B, T]`` with at least one token.
        max_new_tokens: tokens to add, 0 or more.
        temperature, top_k, top_p: see :func:`sample`.
        seed: makes the result reproducible; None draws another one each time.

    Returns:
        Prompt and continuation, int64 ``[B, T + max_new_tokens]``.
    """
    if prompt_ids.ndim != 2 or prompt_ids.shape[1] == 0:
        raise ValueError(
            f"prompt_ids must be [batch, length] with at least one token, got shape {tuple(prompt_ids.shape)}"
        )
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be >= 0, got {max_new_tokens!r}")
    device = next(model.parameters()).device
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    tokens, context, training = prompt_ids.to(device), model.config.context_length, model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            logits = model(tokens if context is None else tokens[:, -context:])[:, -1]
            token = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
            tokens = torch.cat((tokens, token[:, None]), dim=1)
    finally:
        model.train(training)
    return tokens


def encode(text: str) -> Tensor:
    """UTF-8 bytes as tokens, int64 ``[1, T]``."""
    return torch.tensor([list(text.encode())], dtype=torch.int64)


def decode(tokens: Tensor) -> str:
    """Text of byte tokens ``[T]``; bytes that are no UTF-8 become the replacement character."""
    return bytes(tokens.tolist()).decode(errors="replace")
