"""The six synthetic tasks of MAD (Poli et al., arXiv 2403.17844), drawn from a seed.

A task gives token sequences, what training learns from, and what counts in an evaluation. All are
written anew to the published definitions: which tokens are keys, which are answers, and which
answers are scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from hypermlp.checks import as_integer, keep
from hypermlp_lab.study.motifs import fuzzy_recall

# target of a token that is not scored, as torch.nn.functional.cross_entropy has it
IGNORED = -100
TaskName = Literal["recall", "noisy-recall", "fuzzy-recall", "selective-copying", "memorization", "compression"]
TASKS = get_args(TaskName)
# the map to memorise belongs to the task and not to a seed: training and evaluation share it
_MAP_SEED = 12345


class Examples(NamedTuple):
    """Sequences of one task, int64 ``[N, T]`` each.

    Attributes:
        inputs: what the model reads.
        targets: what it learns to say at each token, :data:`IGNORED` where nothing is learnt.
        scored: the same for an evaluation: answers alone.
    """

    inputs: Tensor
    targets: Tensor
    scored: Tensor


@dataclass(frozen=True)
class Task:
    """One task at one size. Frozen; checked.

    Args:
        name: of :data:`TASKS`.
        vocab_size: tokens, special ones and noise among them.
        seq_len: tokens of a sequence; recall tasks read one less, as the last has nothing after it.
        noise_vocab: of the vocabulary, tokens that mean nothing (noisy recall).
        noise: share of the pairs that noise takes the place of (noisy recall).
        motif: longest key and value (fuzzy recall).
        copied: tokens to copy (selective copying).
    """

    name: TaskName
    vocab_size: int
    seq_len: int
    noise_vocab: int = 0
    noise: float = 0.0
    motif: int = 3
    copied: int = 16

    def __post_init__(self) -> None:
        if self.name not in TASKS:
            raise ValueError(f"name must be one of {TASKS}, got {self.name!r}")
        for least, names in ((8, ("vocab_size", "seq_len")), (1, ("motif", "copied")), (0, ("noise_vocab",))):
            keep(self, names, as_integer, least)
        if not 0 <= self.noise < 1:
            raise ValueError(f"noise must be a share from 0 to below 1, got {self.noise!r}")
        if self.name == "noisy-recall" and self.vocab_size - self.noise_vocab < 4:
            raise ValueError(f"noise_vocab={self.noise_vocab} leaves no keys and values: make vocab_size larger")
        if self.name == "selective-copying" and self.seq_len < 2 * self.copied + 1:
            raise ValueError(f"seq_len={self.seq_len} has no room for copied={self.copied}: 2 * copied + 1 at least")
        if self.name == "fuzzy-recall" and not (self.motif <= self.num_keys and 4 * self.motif <= self.seq_len):
            raise ValueError(f"motif={self.motif} is too long for vocab_size and seq_len: make them larger")

    @property
    def shifted(self) -> bool:
        """Whether the answer to a token is the token after it."""
        return "recall" in self.name

    @property
    def width(self) -> int:
        """Tokens that the model reads."""
        return self.seq_len - 1 if self.shifted else self.seq_len

    @property
    def num_keys(self) -> int:
        """Keys, which are the lowest tokens; as many values come after them."""
        special = {"memorization": 1, "fuzzy-recall": 1, "noisy-recall": self.noise_vocab}.get(self.name, 0)
        return (self.vocab_size - special) // 2

    @property
    def chance(self) -> float:
        """Accuracy of a guess among the tokens that may be an answer."""
        if self.name == "selective-copying":
            return 1 / (self.vocab_size - 2)
        if self.name == "compression":
            # the last token is always the same, and known
            return (1 + (self.seq_len - 1) / (self.vocab_size - 1)) / self.seq_len
        return 1 / self.num_keys

    def examples(self, count: int, seed: int | Sequence[int], *, training: bool) -> Examples:
        """``count`` sequences, the same for the same ``seed``.

        Args:
            count: sequences.
            seed: of NumPy's generator, one number or several; another for every split.
            training: fuzzy recall's keys are then of every length, and of the longest one otherwise.
        """
        if count < 1:
            raise ValueError(f"count must be positive, got {count!r}")
        rng = np.random.default_rng(seed)
        if self.name == "fuzzy-recall":
            arrays = fuzzy_recall(self.num_keys, self.vocab_size, self.seq_len, self.motif, count, rng, training)
        else:
            arrays = _GENERATORS[self.name](self, count, rng)
        return Examples(*(torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)) for array in arrays))


def _recall(task: Task, count: int, rng: np.random.Generator) -> tuple[Any, Any, Any]:
    """Pairs of key and value; a key's value is drawn once a sequence, and scored from its second time on."""
    keys, pairs, rows = task.num_keys, task.seq_len // 2, np.arange(count)
    values = rng.integers(keys, 2 * keys, (count, keys))
    key = rng.integers(0, keys, (count, pairs))
    noisy = rng.random((count, pairs)) < task.noise
    # one slot is always a pair, so that there is something to ask for at the end
    noisy[rows, rng.integers(0, pairs - 1, count)] = False
    noisy[:, -1] = False
    earlier = np.tril(np.ones((pairs, pairs), dtype=bool), -1)
    seen = ((key[:, :, None] == key[:, None]) & earlier & ~noisy[:, None]).any(2)
    # the last key is one of those that came before, each as likely
    weight = np.where(noisy | seen, -1.0, rng.random((count, pairs)))
    key[:, -1] = key[rows, weight[:, :-1].argmax(1)]
    seen[:, -1] = True
    seen &= ~noisy
    tokens = np.stack([key, values[rows[:, None], key]], axis=2)
    if task.noise_vocab:
        noise = rng.integers(task.vocab_size - task.noise_vocab, task.vocab_size, tokens.shape)
        tokens = np.where(noisy[..., None], noise, tokens)
    answers = np.full_like(tokens, IGNORED)
    answers[..., 1][seen] = tokens[..., 1][seen]
    tokens, answers = tokens.reshape(count, -1), answers.reshape(count, -1)
    return tokens[:, :-1], tokens[:, 1:], answers[:, 1:]


def _selective_copying(task: Task, count: int, rng: np.random.Generator) -> tuple[Any, Any, Any]:
    """Content among blanks, a marker, and as many blanks as there is content to say there in order."""
    copied, blank, marker = task.copied, task.vocab_size - 2, task.vocab_size - 1
    room = task.seq_len - copied - 1
    content = rng.integers(0, blank, (count, copied))
    inputs = np.full((count, task.seq_len), blank)
    # blanks come before content only: the last content token stands right before the marker
    places = np.sort(rng.random((count, room - 1)).argsort(1)[:, : copied - 1], axis=1)
    places = np.concatenate([places, np.full((count, 1), room - 1)], axis=1)
    np.put_along_axis(inputs, places, content, axis=1)
    inputs[:, room] = marker
    scored = np.full_like(inputs, IGNORED)
    scored[:, -copied:] = content
    return inputs, scored, scored


def _memorization(task: Task, count: int, rng: np.random.Generator) -> tuple[Any, Any, Any]:
    """Keys, each followed by a marker at which the key's value, the same in all sequences, is to be said."""
    keys, marker = task.num_keys, task.vocab_size - 1
    value = keys + np.random.default_rng(_MAP_SEED).permutation(keys)
    key = rng.integers(0, keys, (count, task.seq_len // 2))
    inputs = np.stack([key, np.full_like(key, marker)], axis=2).reshape(count, -1)
    scored = np.full_like(inputs, IGNORED)
    scored[:, 1::2] = value[key]
    return inputs, scored, scored


def _compression(task: Task, count: int, rng: np.random.Generator) -> tuple[Any, Any, Any]:
    """Random tokens and a marker: all of them are to be said again from the marker's state alone."""
    inputs = rng.integers(0, task.vocab_size - 1, (count, task.seq_len))
    inputs[:, -1] = task.vocab_size - 1
    return inputs, inputs, inputs


_GENERATORS = {
    "recall": _recall,
    "noisy-recall": _recall,
    "selective-copying": _selective_copying,
    "memorization": _memorization,
    "compression": _compression,
}
