"""The training loop."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from hypermlp.models import LanguageModel, next_token_loss
from hypermlp_lab.training import checkpoint
from hypermlp_lab.training.config import TrainingConfig
from hypermlp_lab.training.data import Corpus
from hypermlp_lab.training.files import FolderLock
from hypermlp_lab.training.interrupt import StopRequest
from hypermlp_lab.training.memory import peak_memory, reset_peak_memory
from hypermlp_lab.training.optimizer import build_optimizer, descend, learning_rate


class Watcher(Protocol):
    """Told what happens, to show it."""

    def on_step(self, step: int, loss: float, tokens_per_second: float) -> None: ...

    def on_evaluation(self, point: dict[str, float]) -> None: ...


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: steps done.
        seconds: time of these steps, evaluations and checkpoints apart.
        loss_sum, loss_count: of the training loss since the last evaluation.
        history: one entry an evaluation: ``step``, ``train_loss`` (mean since the last one, nats a
            byte), ``validation_loss`` (nats a byte), ``bits_per_byte`` (the same in bits).
        peak_memory: bytes, None if not known.
    """

    step: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    loss_count: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    peak_memory: int | None = None


class Trainer:
    """Trains a model on a corpus; a stopped run goes on as if it had not been stopped.

    Args:
        model: is moved to ``device`` and trained in place.
        corpus: where batches and validation windows come from.
        config: the run.
        out: folder for checkpoints; None for no checkpoints. Of those that are there already none is touched:
            :meth:`resume` first, or training is an error.
        device: where to train.
        watcher: told of steps and evaluations.

    Attributes:
        lock: of ``out``, held by :meth:`run` and :meth:`save`; None without ``out``.

    Raises:
        ValueError: a part of the corpus is shorter than a window.
    """

    def __init__(
        self,
        model: LanguageModel,
        corpus: Corpus,
        config: TrainingConfig,
        *,
        out: Path | None = None,
        device: torch.device | str = "cpu",
        watcher: Watcher | None = None,
    ) -> None:
        corpus.check_length(config.seq_len)
        self.device = torch.device(device)
        self.model, self.corpus, self.config = model.to(self.device), corpus, config
        self.out, self.watcher = out, watcher
        self.optimizer = build_optimizer(model, config)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.progress = Progress()
        self.lock = None if out is None else FolderLock(out)
        self._checkpoint: Path | None = None
        self._identity = {**config.to_dict(), "corpus": corpus.fingerprint()}

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.progress.step >= self.config.steps

    @property
    def tokens_per_second(self) -> float:
        """Training speed so far, 0 before the first step."""
        tokens = self.progress.step * self.config.batch_size * self.config.seq_len
        return tokens / self.progress.seconds if self.progress.seconds else 0.0

    def resume(self, *, longer: bool = False) -> bool:
        """Go back to the newest checkpoint in ``out``; False if there is none.

        Args:
            longer: let the checkpoint be of a run of fewer steps. The learning rate is then that of the longer run from
                here on, higher than where a finished run ended; warm-up and evaluations stay the checkpoint's.

        Raises:
            ValueError: it belongs to another model, data or training configuration, or does not load
                (:class:`~hypermlp_lab.training.checkpoint.CheckpointError`); the trainer is as it was.
        """
        folder = None if self.out is None else checkpoint.latest_checkpoint(self.out)
        if folder is None:
            return False
        model_config, identity = checkpoint.read_config(folder)
        config = self.config
        if longer and isinstance(identity.get("steps"), int) and identity["steps"] <= config.steps:
            # what follows from the number of steps where it is not said
            config = replace(config, **{name: identity[name] for name in ("warmup_steps", "eval_every")})
            identity["steps"] = config.steps
        own = self._identity | config.to_dict()
        self._check_same(folder, {**model_config.to_dict(), **identity}, own)
        weights = checkpoint.read_weights(folder, model_config)
        state = checkpoint.load_trainer_state(folder)
        with checkpoint.reading(folder / checkpoint.TRAINER):
            progress, generator = Progress(**state["progress"]), torch.Generator()
            generator.set_state(state["generator"])
            self.optimizer.load_state_dict(state["optimizer"])
        self.progress, self.generator, self.config, self._identity = progress, generator, config, own
        self.model.load_state_dict(weights)
        self._checkpoint = folder
        return True

    def save(self) -> None:
        """Write a checkpoint, if there is a folder for it and the last one is not of this step.

        Raises:
            FloatingPointError: a weight or a number of the optimizer is not finite.
            ValueError: the folder has checkpoints that this trainer has neither written nor resumed.
            OSError: it cannot be written, or another trainer writes there. Older checkpoints stay in all cases.
        """
        if self.out is None or self.lock is None or checkpoint.is_of_step(self._checkpoint, self.progress.step):
            return
        state = {
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "progress": asdict(self.progress),
        }
        with self.lock:
            self._checkpoint = checkpoint.save_checkpoint(
                self.out, self.progress.step, self.model, self._identity, state, after=self._checkpoint
            )

    def run(self) -> bool:
        """Train to the last step. False if a signal asked to stop: a checkpoint is then written.

        The folder is locked meanwhile.

        Raises:
            FloatingPointError: a loss, a gradient or a weight is not finite. The last checkpoint stays as it is.
            ValueError: the folder has checkpoints that this trainer has neither written nor resumed.
            OSError: a checkpoint cannot be written, or another trainer writes there.
        """
        if self.finished:
            return True
        reset_peak_memory(self.device)
        with self.lock or nullcontext(), StopRequest() as stop:
            if self.out is not None:
                checkpoint.check_newest(self.out, self._checkpoint)
            if not self.progress.history:
                self._evaluate()
            while not self.finished and not stop.requested:
                self._timed_step()
                step = self.progress.step
                if step % self.config.eval_every == 0 or self.finished:
                    self._evaluate()
                if step % self.config.checkpoint_every == 0:
                    self.save()
            self.save()
        return self.finished

    def step(self) -> float:
        """One optimiser step; its loss in nats a byte.

        Raises:
            FloatingPointError: the loss or the gradient is not finite. Weights and optimizer are as they were.
        """
        self.model.train()
        loss = self._loss(*self.corpus.batch(self.config.batch_size, self.config.seq_len, self.generator))
        rate = learning_rate(self.progress.step, self.config)
        value = descend(self.model, self.optimizer, loss, rate, self.config.grad_clip, self.progress.step + 1)
        self.progress.step += 1
        return value

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Nats a byte on the fixed validation windows."""
        self.model.eval()
        inputs, targets = self.corpus.validation_windows(self.config.eval_windows, self.config.seq_len)
        total = 0.0
        for start in range(0, inputs.shape[0], self.config.batch_size):
            rows = slice(start, start + self.config.batch_size)
            total += self._loss(inputs[rows], targets[rows]).item() * targets[rows].numel()
        return total / targets.numel()

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        inputs, targets = inputs.to(self.device), targets.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            logits = self.model(inputs)
        return next_token_loss(logits, targets)

    def _timed_step(self) -> None:
        start = time.perf_counter()
        loss = self.step()
        self.progress.seconds += time.perf_counter() - start
        self.progress.loss_sum += loss
        self.progress.loss_count += 1
        if self.watcher is not None:
            self.watcher.on_step(self.progress.step, loss, self.tokens_per_second)

    def _evaluate(self) -> None:
        progress = self.progress
        loss = self.validation_loss()
        if not math.isfinite(loss):
            raise FloatingPointError(f"after step {progress.step} the validation loss is {loss}: try a smaller lr")
        point: dict[str, float] = {"step": progress.step, "validation_loss": loss, "bits_per_byte": loss / math.log(2)}
        if progress.loss_count:
            point["train_loss"] = progress.loss_sum / progress.loss_count
        progress.loss_sum, progress.loss_count = 0.0, 0
        known = (progress.peak_memory, peak_memory(self.device))
        progress.peak_memory = max((peak for peak in known if peak is not None), default=None)
        progress.history.append(point)
        if self.watcher is not None:
            self.watcher.on_evaluation(point)

    def _check_same(self, folder: Path, saved: dict[str, Any], own: dict[str, Any]) -> None:
        # device and checkpoint_every may change: they do not decide what is learnt
        own = {"max_lags": None, **self.model.config.to_dict(), **own}
        different = sorted(name for name in own if name != "checkpoint_every" and saved.get(name) != own[name])
        if different:
            wanted = ", ".join(f"{name}={saved.get(name)!r}" for name in different if name != "corpus")
            remedy = f"resume with {wanted}" if wanted else "its text has changed since"
            if any(name not in saved for name in different):
                remedy = "it was written by another version, train anew"
            raise ValueError(f"{folder} is of another run, different in {', '.join(different)}: {remedy}")
