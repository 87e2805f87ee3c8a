"""The tasks are what their definitions promise: checked token by token, by loops that share no code with them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hypermlp_lab.study.tasks import IGNORED, TASKS, Examples, Task

SMALL = {
    "recall": Task("recall", 16, 32),
    "noisy-recall": Task("noisy-recall", 32, 32, noise_vocab=16, noise=0.3),
    "fuzzy-recall": Task("fuzzy-recall", 16, 48),
    "selective-copying": Task("selective-copying", 16, 24, copied=5),
    "memorization": Task("memorization", 32, 12),
    "compression": Task("compression", 16, 10),
}


def rows(examples: Examples) -> list[tuple[list[int], list[int], list[int]]]:
    return [tuple(part[i].tolist() for part in examples) for i in range(examples.inputs.shape[0])]  # type: ignore[misc]


@pytest.mark.parametrize("name", TASKS)
def test_same_seed_same_examples(name: str) -> None:
    task = SMALL[name]
    first, again = (task.examples(20, (3, 1), training=True) for _ in range(2))
    other = task.examples(20, (3, 2), training=True)
    for part, same, different in zip(first, again, other, strict=True):
        assert part.dtype == torch.int64
        assert part.shape == (20, task.width)
        assert torch.equal(part, same)
        assert not torch.equal(part, different)
    assert int(first.inputs.min()) >= 0
    assert int(first.inputs.max()) < task.vocab_size


@pytest.mark.parametrize("name", ["recall", "noisy-recall"])
def test_recall_scores_the_value_of_every_key_seen_before(name: str) -> None:
    task = SMALL[name]
    keys, noise = task.num_keys, range(task.vocab_size - task.noise_vocab, task.vocab_size)
    assert keys == 8
    for inputs, targets, scored in rows(task.examples(200, 0, training=False)):
        assert inputs[1:] == targets[:-1]
        sequence = [*inputs, targets[-1]]
        known: dict[int, int] = {}
        for i in range(0, len(sequence), 2):
            first, second = sequence[i : i + 2]
            if i:
                assert scored[i - 1] == IGNORED
            if task.noise_vocab and first in noise:
                assert second in noise
                assert scored[i] == IGNORED
                continue
            assert 0 <= first < keys <= second < 2 * keys
            assert scored[i] == (second if first in known else IGNORED)
            assert known.setdefault(first, second) == second
        # the last pair asks again
        assert scored[-1] != IGNORED


def test_noise_takes_its_share() -> None:
    task = SMALL["noisy-recall"]
    inputs = task.examples(2000, 0, training=True).inputs
    share = (inputs[:, :-1:2] >= 16).double().mean().item()
    # one slot of fifteen is always clean
    assert share == pytest.approx(0.3 * 14 / 15, abs=0.01)


def fuzzy_pairs(sequence: list[int]) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Where each value starts, its key and itself: keys are below 7, values from 7 to 13, padding is 15."""
    start, pairs = next(i for i, token in enumerate(sequence) if token != 15), []
    assert all(token < 14 for token in sequence[start:])
    while start < len(sequence):
        middle = start
        while sequence[middle] < 7:
            middle += 1
        stop = middle
        while stop < len(sequence) and sequence[stop] >= 7:
            stop += 1
        pairs.append((middle, tuple(sequence[start:middle]), tuple(sequence[middle:stop])))
        start = stop
    return pairs


@pytest.mark.parametrize("training", [False, True])
def test_fuzzy_recall_scores_every_token_of_a_known_keys_value(training: bool) -> None:
    task = SMALL["fuzzy-recall"]
    lengths: set[int] = set()
    for inputs, targets, scored in rows(task.examples(200, 0, training=training)):
        sequence = [*inputs, targets[-1]]
        known: dict[tuple[int, ...], tuple[int, ...]] = {}
        wanted = {}
        for at, key, value in fuzzy_pairs(sequence):
            lengths.add(len(key))
            for motif in (key, value):
                assert 1 <= len(motif) <= 3
                assert len(set(motif)) == len(motif)
            if key in known:
                assert value == known[key]
                wanted |= {at - 1 + i: token for i, token in enumerate(value)}
            known[key] = value
        assert {i: token for i, token in enumerate(scored) if token != IGNORED} == wanted
        # the last value is asked for
        assert len(inputs) - 1 in wanted
        assert [token for token in targets if token != IGNORED] == [token for token in sequence[1:] if token != 15]
    assert lengths == ({1, 2, 3} if training else {3})


def test_selective_copying_asks_for_the_content_in_order() -> None:
    for inputs, targets, scored in rows(SMALL["selective-copying"].examples(200, 0, training=False)):
        assert targets == scored
        assert inputs[-6] == 15
        assert inputs[-5:] == [14] * 5
        before = inputs[:-6]
        content = [token for token in before if token != 14]
        assert len(content) == 5
        assert 15 not in before
        # blanks come before content, never after the last
        assert before[-1] != 14
        assert scored == [IGNORED] * 19 + content


def test_memorization_has_one_map_for_all_splits() -> None:
    task = SMALL["memorization"]
    known: dict[int, int] = {}
    for seed in (0, 1):
        for inputs, _, scored in rows(task.examples(100, seed, training=not seed)):
            assert inputs[1::2] == [31] * 6
            assert scored[::2] == [IGNORED] * 6
            for key, value in zip(inputs[::2], scored[1::2], strict=True):
                assert 0 <= key < 15 <= value < 30
                assert known.setdefault(key, value) == value
    assert sorted(known.values()) == list(range(15, 30))


def test_compression_asks_for_everything() -> None:
    for inputs, targets, scored in rows(SMALL["compression"].examples(50, 0, training=False)):
        assert inputs == targets == scored
        assert inputs[-1] == 15
        assert max(inputs[:-1]) < 15


@pytest.mark.parametrize("name", TASKS)
def test_chance_is_what_the_likeliest_answer_to_a_token_gets(name: str) -> None:
    """Nothing near an answer gives it away: the best guess from the last token, or from the place, is at chance."""
    task = SMALL[name]
    examples = task.examples(20_000, 5, training=False)
    scored = examples.scored != IGNORED
    answers, place = examples.scored[scored].numpy(), np.nonzero(scored.numpy())[1]
    last = examples.inputs[scored].numpy()
    if name == "memorization":  # the key stands before the marker: knowing the map is the task
        guessed = best_guess(last, answers, task)
    elif name == "compression":
        guessed = best_guess(place, answers, task)
    else:
        guessed = max(best_guess(last, answers, task), best_guess(place, answers, task))
    # the best of several guesses on a finite sample lies a little above chance
    assert task.chance - 0.01 < guessed < task.chance + 0.03


def best_guess(known: np.ndarray, answers: np.ndarray, task: Task) -> float:
    """Share of the answers that are the likeliest one for what is known."""
    table = np.zeros((known.max() + 1, task.vocab_size))
    np.add.at(table, (known, answers), 1)
    return float(table.max(1).sum() / len(answers))


def test_the_answer_is_not_the_token_itself() -> None:
    for name in TASKS:
        if name != "compression":
            examples = SMALL[name].examples(100, 0, training=False)
            assert not (examples.inputs == examples.scored).any()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"name": "copying"}, "copying"),
        ({"vocab_size": 7}, "vocab_size"),
        ({"seq_len": 7}, "seq_len"),
        ({"noise": 1.0}, "noise"),
        ({"noise": math.nan}, "noise"),
        ({"name": "selective-copying", "copied": 16}, "copied"),
        ({"name": "noisy-recall", "noise_vocab": 14}, "noise_vocab"),
        ({"name": "fuzzy-recall", "motif": 9}, "motif"),
    ],
)
def test_mistakes_are_named(fields: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Task(**{"name": "recall", "vocab_size": 16, "seq_len": 32} | fields)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="count"):
        SMALL["recall"].examples(0, 0, training=True)
