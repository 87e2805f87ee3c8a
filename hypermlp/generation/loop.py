"""The loop that continues prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hypermlp.cache import HyperCache
from hypermlp.checks import as_flag, as_integer, check_kind, check_names, integer
from hypermlp.evaluating import evaluating
from hypermlp.generation.sampling import apply_repetition_penalty, check_sampling, sample
from hypermlp.models import LanguageModel, LanguageModelConfig
from hypermlp.ops.checks import check_attention_mask


def generate(model: LanguageModel, prompt_ids: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
    """Continue each prompt.

    Args:
        model: is put into evaluation mode meanwhile.
        prompt_ids: int64 or int32 ``[B, T]`` with at least one token.
        max_new_tokens: tokens to add at most, 0 or more.
        options: see :func:`stream`.

    Returns:
        Prompts and continuations, int64 ``[B * num_samples, T + n]``, samples of one prompt side by
        side; rows that met a stop sequence are filled with ``pad_token_id``.
    """
    check_names("generate", options, stream.__kwdefaults__ or ())
    steps = list(stream(model, prompt_ids, max_new_tokens, **options))
    prompts = prompt_ids.to(_device(model), torch.int64).repeat_interleave(options.get("num_samples", 1), dim=0)
    return torch.cat((prompts, *(step[:, None] for step in steps)), dim=1)


def stream(
    model: LanguageModel,
    prompt_ids: Tensor,
    max_new_tokens: int,
    *,
    attention_mask: Tensor | None = None,
    num_samples: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: Sequence[Sequence[int]] = (),
    pad_token_id: int = 0,
    seed: int | None = None,
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """Continue each prompt, giving tokens as they come.

    With a cache a token costs the same however long the text is beyond the model's windows. A
    model without windows is made for ``context_length`` tokens: when these are full it starts
    again from their last half.

    Args:
        model: is put into evaluation mode meanwhile.
        prompt_ids: int64 or int32 ``[B, T]`` with at least one token a row.
        max_new_tokens: tokens to add at most, 0 or more.
        attention_mask: bool or integer ``[B, T]``, 1 for a token of the prompt; padding may be on
            the left or on the right.
        num_samples: continuations of each prompt.
        temperature, top_k, top_p: see :func:`sample`.
        repetition_penalty: see :func:`apply_repetition_penalty`; counts the prompt.
        stop: token sequences that end a row once it has produced one of them.
        pad_token_id: what a row that has ended goes on with.
        seed: makes the result reproducible; None draws another one each time.
        use_cache: False computes each token from the last ``context_length`` ones anew.

    Returns:
        An iterator over the next token of each row, int64 ``[B * num_samples]``, until every row has ended.
    """
    # of a compiled one, too, which is of another class
    if not isinstance(getattr(model, "config", None), LanguageModelConfig):
        kind = type(model).__name__
        raise TypeError(
            f"model must be a LanguageModel, got {kind}: models of transformers have a generate() of their own"
        )
    max_new_tokens = as_integer("max_new_tokens", max_new_tokens, 0)
    num_samples = as_integer("num_samples", num_samples, 1)
    pad_token_id = as_integer("pad_token_id", pad_token_id, 0)
    valid = _valid(prompt_ids, attention_mask)
    _check_stop(stop)
    check_sampling(temperature, top_k, top_p, repetition_penalty)
    use_cache = as_flag("use_cache", use_cache)
    device = _device(model)
    text = _Text(prompt_ids.to(device, torch.int64), None if valid is None else valid.to(device))
    generator = _generator(device, seed)

    reader = _CachedReader(model, text) if use_cache else _Recomputer(model, text)

    # the decorator, unlike a with block, leaves the caller's gradient mode alone between tokens
    @torch.no_grad()
    def steps() -> Iterator[Tensor]:
        ended = torch.zeros(len(prompt_ids) * num_samples, dtype=torch.bool, device=device)
        with evaluating(model):
            for count in range(1, max_new_tokens + 1):
                logits = reader.next()
                if count == 1:
                    logits = logits.repeat_interleave(num_samples, dim=0)
                    text.repeat(num_samples)
                    reader.repeat(num_samples)
                if repetition_penalty != 1.0:
                    logits = apply_repetition_penalty(logits, text.seen(logits.shape[-1]), repetition_penalty)
                token = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
                if stop:
                    token = torch.where(ended, pad_token_id, token)
                text.append(token)
                yield token
                if stop:
                    ended = ended | text.ends_with(stop, count)
                    if bool(ended.all()):
                        return

    return steps()


class _Text:
    """Prompts and what has been added, aligned at the newest token."""

    def __init__(self, tokens: Tensor, valid: Tensor | None) -> None:
        if valid is not None:
            # rows padded on the right move: the sort keeps the order of what it does not move
            order = valid.to(torch.int8).sort(dim=1, stable=True).indices
            tokens, valid = tokens.gather(1, order), valid.gather(1, order)
        self.tokens, self.padded = tokens, valid is not None
        self.valid = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid

    def repeat(self, times: int) -> None:
        self.tokens, self.valid = (x.repeat_interleave(times, dim=0) for x in (self.tokens, self.valid))

    def append(self, token: Tensor) -> None:
        self.tokens = torch.cat((self.tokens, token[:, None]), dim=1)
        self.valid = F.pad(self.valid, (0, 1), value=True)

    def last(self, count: int | None) -> tuple[Tensor, Tensor | None]:
        """The newest ``count`` tokens of every row and which of them count; None for all."""
        first = 0 if count is None else max(0, self.tokens.shape[1] - count)
        return self.tokens[:, first:], self.valid[:, first:] if self.padded else None

    def seen(self, vocab_size: int) -> Tensor:
        """Bool ``[B, vocab_size]``: the tokens each row has."""
        counts = torch.zeros(self.tokens.shape[0], vocab_size, device=self.tokens.device)
        return counts.scatter_add_(1, self.tokens, self.valid.to(counts.dtype)) > 0

    def ends_with(self, stop: Sequence[Sequence[int]], added: int) -> Tensor:
        """Bool ``[B]``: rows whose ``added`` newest tokens end with one of ``stop``."""
        ends = torch.zeros(self.tokens.shape[0], dtype=torch.bool, device=self.tokens.device)
        for sequence in stop:
            if len(sequence) <= added:
                wanted = torch.tensor(list(sequence), device=self.tokens.device)
                ends = ends | (self.tokens[:, -len(sequence) :] == wanted).all(1)
        return ends


class _Recomputer:
    """Next-token logits from the last ``context_length`` tokens, anew each time."""

    def __init__(self, model: LanguageModel, text: _Text) -> None:
        self.model, self.text = model, text

    def next(self) -> Tensor:
        logits: Tensor = self.model(*self.text.last(self.model.config.context_length))
        return logits[:, -1]

    def repeat(self, times: int) -> None:
        """Nothing is kept."""


class _CachedReader:
    """Next-token logits with a cache, which starts again where the context is bounded and full."""

    def __init__(self, model: LanguageModel, text: _Text) -> None:
        self.model, self.text = model, text
        self.cache: HyperCache | None = None
        windowed = model.config.attention.window is not None
        self.context = None if windowed else _fits(model)

    def next(self) -> Tensor:
        if self.cache is None:
            return self._prefill(self.context)
        if self.context is not None and self.cache.get_seq_length() >= self.context:
            return self._prefill(max(1, self.context // 2))
        logits: Tensor = self.model(self.text.tokens[:, -1:], cache=self.cache)
        return logits[:, -1]

    def repeat(self, times: int) -> None:
        if self.cache is not None and times > 1:
            self.cache.repeat(times)

    def _prefill(self, count: int | None) -> Tensor:
        self.cache = HyperCache(max_crop=0)
        logits: Tensor = self.model(*self.text.last(count), cache=self.cache)
        return logits[:, -1]


def _fits(model: LanguageModel) -> int | None:
    """Tokens that a model without windows takes at once."""
    layers = map(model.config.attention_config, range(model.config.num_layers))
    bounds = [model.config.context_length, *(c.max_lag if c.layout == "position" else None for c in layers)]
    return min((bound for bound in bounds if bound is not None), default=None)


def _valid(prompt_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """The mask as bool, of prompts that can be continued."""
    check_kind("prompt_ids", prompt_ids, Tensor)
    if prompt_ids.ndim != 2 or prompt_ids.shape[1] == 0:
        raise ValueError(
            f"prompt_ids must be [batch, length] with at least one token, got shape {tuple(prompt_ids.shape)}"
        )
    if prompt_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"prompt_ids must be int64 or int32, got {prompt_ids.dtype}")
    if attention_mask is None:
        return None
    check_kind("attention_mask", attention_mask, Tensor)
    valid = check_attention_mask(attention_mask.to(prompt_ids.device), prompt_ids)
    if not bool(valid.any(1).all()):
        raise ValueError("attention_mask leaves a row without tokens: give every prompt at least one")
    return valid


def _check_stop(stop: Sequence[Sequence[int]]) -> None:
    if not isinstance(stop, (Sequence, Set)):
        raise TypeError(f"stop must be sequences of tokens, got {type(stop).__name__}: write stop=[[token, ...], ...]")
    if texts := [text for text in (stop, *stop) if isinstance(text, str)]:
        raise TypeError(f"stop must be sequences of tokens, got the text {texts[0]!r}: encode it first")
    if alone := [token for token in stop if integer(token) is not None]:
        raise TypeError(f"stop must be sequences of tokens, got the token {alone[0]}: write stop=[[{alone[0]}]]")
    if odd := [sequence for sequence in stop if not (isinstance(sequence, Sequence) or hasattr(sequence, "__array__"))]:
        raise TypeError(f"stop must be sequences of tokens, got a {type(odd[0]).__name__} among them")
    if any(len(sequence) == 0 for sequence in stop):
        raise ValueError("stop has an empty sequence, which every row ends with: leave it out")


def _device(model: LanguageModel) -> torch.device:
    return next(model.parameters()).device


def _generator(device: torch.device, seed: int | None) -> torch.Generator:
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
        return generator
    return generator.manual_seed(as_integer("seed", seed, remedy="None draws another one each time"))
