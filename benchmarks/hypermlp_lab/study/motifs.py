"""Fuzzy recall: keys and values of one to a few tokens each."""

from __future__ import annotations

from typing import Any

import numpy as np

_IGNORED = -100


def fuzzy_recall(
    keys: int, vocab_size: int, seq_len: int, longest: int, count: int, rng: np.random.Generator, training: bool
) -> tuple[Any, Any, Any]:
    """Inputs, targets and scored targets, ``[count, seq_len - 1]``.

    A key is one to ``longest`` distinct key tokens in some order, and ``longest`` of them outside of
    training; a value likewise, of every length. A key's value is drawn once a sequence. The last pair
    repeats a key. Sequences are padded on the left with the last token of the vocabulary.

    Args:
        keys: key tokens ``0 .. keys - 1``; as many value tokens follow.
        vocab_size, seq_len, count: as in a task.
        longest: tokens of the longest key.
        rng: where all draws come from.
        training: draw keys of every length.
    """
    # the shortest pair has two tokens in training, so this many fit at most
    slots, rows = seq_len // (2 if training else longest + 1), np.arange(count)
    key, key_len = _motifs(rng, keys, longest, (count, slots), longest if not training else 1)
    value, value_len = _motifs(rng, keys, longest, (count, slots), 1)
    value += keys
    # a key's value is the one of its first time, which decides how long the pairs are
    first = _first_time(key, key_len, keys)
    value, value_len = np.take_along_axis(value, first[..., None], 1), np.take_along_axis(value_len, first, 1)
    seen = first < np.arange(slots)
    # how many pairs fit before the last one, which may be as long as any
    ends = np.cumsum(key_len + value_len, axis=1)
    used = np.minimum((ends + 2 * longest <= seq_len).sum(1), slots - 1)
    # in the place after them one of their keys comes again, each as likely
    new = ~seen & (np.arange(slots) < used[:, None])
    asked = np.where(new, rng.random(new.shape), -1.0).argmax(1)
    for part in (key, key_len, value, value_len):
        part[rows, used] = part[rows, asked]
    seen[rows, used] = True
    tokens, answers = _laid_out(key, key_len, value, value_len, seen, used, seq_len, vocab_size - 1)
    targets = np.where(tokens == vocab_size - 1, _IGNORED, tokens)
    return tokens[:, :-1], targets[:, 1:], answers[:, 1:]


def _motifs(
    rng: np.random.Generator, symbols: int, longest: int, shape: tuple[int, int], shortest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Motifs ``[*shape, longest]`` of distinct symbols, and their lengths ``shape``."""
    order = rng.random((*shape, symbols)).argsort(-1)[..., :longest]
    return order, rng.integers(shortest, longest + 1, shape)


def _first_time(key: np.ndarray, length: np.ndarray, symbols: int) -> np.ndarray:
    """For each slot, the first slot with the same key."""
    inside = np.arange(key.shape[2]) < length[..., None]
    digits = np.where(inside, key + 1, 0)
    code = (digits * (symbols + 1) ** np.arange(key.shape[2])).sum(-1)
    first: np.ndarray = (code[:, :, None] == code[:, None]).argmax(2)
    return first


def _laid_out(
    key: np.ndarray, key_len: np.ndarray, value: np.ndarray, value_len: np.ndarray,
    seen: np.ndarray, used: np.ndarray, seq_len: int, pad: int,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Tokens ``[N, seq_len]``, right-aligned, and the value tokens of keys seen before."""
    count, slots, longest = key.shape
    kept = np.arange(slots) <= used[:, None]
    at = np.arange(longest)
    present = np.concatenate([at < key_len[..., None], at < value_len[..., None]], axis=2) & kept[..., None]
    symbols = np.concatenate([key, value], axis=2)
    answers = np.where(seen[..., None] & (np.arange(2 * longest) >= longest), symbols, _IGNORED)
    present, symbols, answers = (part.reshape(count, -1) for part in (present, symbols, answers))
    length = present.sum(1, keepdims=True)
    column = seq_len - length + np.cumsum(present, axis=1) - 1
    tokens, scored = np.full((count, seq_len), pad), np.full((count, seq_len), _IGNORED)
    row = np.broadcast_to(np.arange(count)[:, None], present.shape)[present]
    tokens[row, column[present]] = symbols[present]
    scored[row, column[present]] = answers[present]
    return tokens, scored
