"""One run of the study: what decides it, and how it is trained and scored."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from hypermlp.budget import count_parameters
from hypermlp.checks import as_integer, as_number, keep
from hypermlp.models import LanguageModel
from hypermlp_lab.study.models import Size, Start, build_model, model_config, scored_loss
from hypermlp_lab.study.tasks import Examples, Task
from hypermlp_lab.training import Corpus, Trainer, TrainingConfig, load_corpus
from hypermlp_lab.training.config import Precision
from hypermlp_lab.training.optimizer import build_optimizer, descend, learning_rate

TEXT = "text"
# parts of a task's data, beside the seed
_TRAIN, _SELECTION, _REPORT = range(3)


@dataclass(frozen=True)
class Job:
    """What is learnt, and how much of it: the same for all variants.

    Args:
        name: of the task, :data:`TEXT` for language modelling.
        hidden_size, num_layers, mix_rank: of the models.
        seq_len: tokens of a window of text; a task has its own.
        steps, batch_size: of training.
        task: the task; None for text.
        data: text file or folder, kept as its one absolute path; None for the standard library.
        train_examples: sequences of the training split.
        eval_examples: sequences, or windows, of each of the two splits that are scored.
        evaluations: points of the curve.
        schedule: ``"cosine"`` after a warm-up, or ``"constant"``.
        dtype: ``"float32"``, or ``"bfloat16"`` for autocast.
        device: where to train.
    """

    name: str
    hidden_size: int
    num_layers: int
    mix_rank: int
    seq_len: int
    steps: int
    batch_size: int
    task: Task | None = None
    data: str | None = None
    train_examples: int = 0
    eval_examples: int = 512
    evaluations: int = 5
    schedule: Literal["cosine", "constant"] = "cosine"
    dtype: Precision = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        keep(self, vars(self).keys() - {"name", "task", "data", "schedule", "dtype", "device"}, as_integer, 0)
        # jobs are compared: two spellings of one path are the same text
        if self.data is not None:
            object.__setattr__(self, "data", str(Path(self.data).expanduser().resolve()))

    @property
    def size(self) -> Size:
        vocab = 256 if self.task is None else self.task.vocab_size
        return Size(self.hidden_size, self.num_layers, self.mix_rank, vocab, self.seq_len)

    @property
    def higher_is_better(self) -> bool:
        """Whether the score is an accuracy; that of text is a loss in nats a byte."""
        return self.task is not None


@dataclass(frozen=True)
class Run:
    """One model to train. All that decides the result is here: equal runs give equal results."""

    job: Job
    label: str
    start: Start
    lr: float
    weight_decay: float
    heads: int
    seed: int
    table_lr: float = 1.0

    def __post_init__(self) -> None:
        keep(self, ("lr", "weight_decay", "table_lr"), as_number, True)
        keep(self, ("heads", "seed"), as_integer, 0)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Run:
        """The run that :func:`dataclasses.asdict` made ``values`` of."""
        job = dict(values["job"])
        task = None if job["task"] is None else Task(**job["task"])
        return cls(**{**values, "job": Job(**{**job, "task": task})})

    def __str__(self) -> str:
        slow = f" (tables x {self.table_lr:g})" if self.table_lr != 1 else ""
        start = f"{self.start}, lr {self.lr:g}{slow}, decay {self.weight_decay:g}, {self.heads} heads"
        return f"{self.job.name:<18} {self.label:<11} {start}, seed {self.seed}"

    def training(self) -> TrainingConfig:
        job = self.job
        return TrainingConfig(
            job.steps, batch_size=job.batch_size, seq_len=job.seq_len, lr=self.lr, weight_decay=self.weight_decay,
            eval_windows=job.eval_examples, seed=self.seed, dtype=job.dtype, table_lr=self.table_lr,
        )  # fmt: skip


class _Learner(NamedTuple):
    """What the loop needs to know of a model in training."""

    step: Callable[[], float]
    evaluate: Callable[[int], dict[str, float]]


def perform(run: Run) -> dict[str, Any]:
    """Train and score one model. The result has plain JSON values.

    ``score`` is of the report split and ``selection`` of the one that settings are chosen on. A run whose loss
    or gradient stops being finite ends there: ``diverged_at`` says at which step, and the score is of the
    weights before it.
    """
    began = time.process_time()
    torch.manual_seed(run.seed)
    job = run.job
    model = build_model(run.label, job.size, run.heads, run.start, autoencoder=job.name == "compression")
    learner = _text_learner(run, model) if job.task is None else _task_learner(run, job.task, model)
    config = model_config(run.label, job.size, run.heads)
    attention = config.attention
    curve = [{"step": 0, "cpu_seconds": 0.0} | learner.evaluate(_REPORT)]
    spent, losses, diverged_at = 0.0, [], None
    points = {round(job.steps * (i + 1) / job.evaluations) for i in range(job.evaluations)} | {job.steps}
    for step in range(1, job.steps + 1):
        before = time.process_time()
        try:
            losses.append(learner.step())
        except FloatingPointError:
            diverged_at = step
            break
        spent += time.process_time() - before
        if step in points:
            trained = {"step": step, "cpu_seconds": round(spent, 3), "train_loss": sum(losses) / len(losses)}
            curve.append(trained | learner.evaluate(_REPORT))
            losses.clear()
    report, selection = learner.evaluate(_REPORT), learner.evaluate(_SELECTION)
    return {
        "run": asdict(run),
        "score": report["score"],
        "selection": selection["score"],
        "details": {"report": report, "selection": selection},
        "diverged_at": diverged_at,
        "curve": curve,
        "tokens": (diverged_at - 1 if diverged_at else job.steps) * job.batch_size * job.seq_len,
        "cpu_seconds": round(spent, 3),
        "total_cpu_seconds": round(time.process_time() - began, 3),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layer_parameters": count_parameters(attention).total,
        "widths": {
            "qk_dim": attention.qk_dim, "v_dim": attention.v_dim, "mix_rank": attention.mix_rank,
            "intermediate_size": config.intermediate_size,
        },
    }  # fmt: skip


def _task_learner(run: Run, task: Task, model: nn.Module) -> _Learner:
    job, config, device = run.job, run.training(), torch.device(run.job.device)
    model.to(device)
    optimizer = build_optimizer(model, config)
    splits = [
        task.examples(count, (run.seed, split), training=split == _TRAIN)
        for split, count in enumerate((job.train_examples, job.eval_examples, job.eval_examples))
    ]
    batches = _batches(splits[_TRAIN], job.batch_size, torch.Generator().manual_seed(run.seed))
    done = 0

    def step() -> float:
        nonlocal done
        model.train()
        inputs, targets = (part.to(device) for part in next(batches))
        with torch.autocast(device.type, torch.bfloat16, enabled=job.dtype == "bfloat16"):
            logits = model(inputs)
        rate = config.lr if job.schedule == "constant" else learning_rate(done, config)
        loss = descend(model, optimizer, scored_loss(logits, targets), rate, config.grad_clip, done + 1)
        done += 1
        return loss

    return _Learner(step, lambda split: accuracy(model, splits[split], job.batch_size))


def _batches(examples: Examples, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches for ever, each sequence once an epoch."""
    count = examples.inputs.shape[0]
    order = torch.empty(0, dtype=torch.long)
    while True:
        while order.numel() < size:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        rows, order = order[:size], order[size:]
        yield examples.inputs[rows], examples.targets[rows]


@torch.no_grad()
def accuracy(model: nn.Module, examples: Examples, batch_size: int) -> dict[str, float]:
    """How many of the scored tokens are said right.

    Returns:
        ``score``: their share; ``macro``: the mean of the shares of each answer, as torchmetrics'
        ``MulticlassAccuracy`` has it by default; ``loss``: nats a scored token.
    """
    model.eval()
    device = next(model.parameters()).device
    found, answers, loss = [], [], 0.0
    for start in range(0, examples.inputs.shape[0], batch_size):
        inputs, scored = (part[start : start + batch_size].to(device) for part in (examples.inputs, examples.scored))
        logits, wanted = model(inputs)[scored >= 0].float(), scored[scored >= 0]
        loss += nn.functional.cross_entropy(logits, wanted, reduction="sum").item()
        found.append((logits.argmax(-1) == wanted).cpu())
        answers.append(wanted.cpu())
    right, wanted = torch.cat(found).double(), torch.cat(answers)
    known, which = torch.unique(wanted, return_inverse=True)
    each = torch.zeros(known.numel(), dtype=torch.double).index_add_(0, which, right) / which.bincount()
    return {"score": right.mean().item(), "macro": each.mean().item(), "loss": loss / len(wanted)}


def _text_learner(run: Run, model: nn.Module) -> _Learner:
    assert isinstance(model, LanguageModel)
    corpora = halves(corpus_of(run.job.data))
    trainer = Trainer(model, corpora[0], run.training(), device=run.job.device)

    def evaluate(split: int) -> dict[str, float]:
        trainer.corpus = corpora[split - _SELECTION]
        loss = math.inf
        with suppress(FloatingPointError):
            loss = trainer.validation_loss()
        return {"score": loss, "loss": loss}

    return _Learner(trainer.step, evaluate)


@lru_cache(maxsize=1)
def corpus_of(data: str | None) -> Corpus:
    """The text, read once a process."""
    return load_corpus(data)


def halves(corpus: Corpus) -> tuple[Corpus, Corpus]:
    """The same corpus with the first half of its validation text, to choose by, and with the second, to report."""
    middle = corpus.validation.numel() // 2
    return (
        replace(corpus, validation=corpus.validation[:middle]),
        replace(corpus, validation=corpus.validation[middle:]),
    )
