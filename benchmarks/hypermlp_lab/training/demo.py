"""``hypermlp demo``: HyperGLU and softmax attention of equal size, trained side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from hypermlp.generation import generate
from hypermlp.models import LanguageModel, LanguageModelConfig
from hypermlp.ops.attention import Backend
from hypermlp_lab.console import say
from hypermlp_lab.text import decode
from hypermlp_lab.training import run_report
from hypermlp_lab.training.checkpoint import delete_checkpoints, latest_checkpoint
from hypermlp_lab.training.config import TrainingConfig
from hypermlp_lab.training.data import Corpus
from hypermlp_lab.training.display import run_shown
from hypermlp_lab.training.files import FolderLock, check_folder, delete
from hypermlp_lab.training.memory import check_memory
from hypermlp_lab.training.recipe import byte_model, match_parameters, parameter_count
from hypermlp_lab.training.trainer import Trainer

_REMEDY = "add --fresh (make demo FRESH=1) to delete that demo and train anew, or choose another --out"
_MIXERS = {"hyperglu": "HyperGLU", "softmax": "softmax"}
_PROMPT_BYTES, _SAMPLE_BYTES, _SAMPLE_TEMPERATURE, _SAMPLE_TOP_P = 64, 240, 0.8, 0.95


@dataclass(frozen=True)
class Demo:
    """One comparison; both models get the same optimiser, learning rate and data order.

    Args:
        corpus: text to learn.
        training: how.
        hidden_size, num_layers: of both models.
        out: folder for checkpoints, ``report.json`` and ``curves.png``.
        device: where to train.
        backend: path of the operator.
    """

    corpus: Corpus
    training: TrainingConfig
    hidden_size: int
    num_layers: int
    out: Path
    device: torch.device
    backend: Backend = "auto"

    def run(self, console: Console, *, fresh: bool = False) -> bool:
        """Train both, show and save the comparison. False if interrupted.

        Goes on with the demo in ``out``, or shows its result again.

        Args:
            console: where to write.
            fresh: delete the demo that is in ``out`` before.

        Raises:
            ValueError: what is in ``out`` is no demo of these options.
        """
        configs = self.model_configs()
        for config in configs.values():
            check_memory(config, self.training, self.device)
        check_folder(self.out, *run_report.FILES)
        for mixer in _MIXERS:
            check_folder(self.out / mixer)
        with FolderLock(self.out):
            self._describe(console, configs)
            self._prepare(fresh)
            ended = (self.out / run_report.REPORT).exists()
            trainers = {}
            for mixer, config in configs.items():
                trainers[mixer] = self._trainer(mixer, config, console)
                if ended and not trainers[mixer].finished:
                    raise ValueError(f"{self.out / run_report.REPORT} exists, but not all of its models: {_REMEDY}")
                if not self._train(trainers[mixer], _MIXERS[mixer], console):
                    return False
            self._conclude(trainers, console, again=ended)
        return True

    def model_configs(self) -> dict[str, LanguageModelConfig]:
        """Both models, of equal parameter count."""
        shape = {"hidden_size": self.hidden_size, "num_layers": self.num_layers, "seq_len": self.training.seq_len}
        configs = match_parameters(*(byte_model(mixer, **shape) for mixer in _MIXERS))
        return dict(zip(_MIXERS, configs, strict=True))

    def _describe(self, console: Console, configs: dict[str, LanguageModelConfig]) -> None:
        corpus, training = self.corpus, self.training
        say(
            console,
            f"Text: {corpus.name}, {corpus.train.numel():,} bytes to train on ({len(corpus.train_files)} files), "
            f"{corpus.validation.numel():,} to validate ({len(corpus.validation_files)} files)",
        )
        say(
            console,
            f"{training.steps} steps of {training.batch_size} x {training.seq_len} bytes on {self.device}, "
            f"learning rate {training.lr:g}, seed {training.seed}",
        )
        for mixer, config in configs.items():
            say(
                console,
                f"{_MIXERS[mixer]:<9} {parameter_count(config):,} parameters: {config.num_layers} layers, "
                f"width {config.hidden_size}, MLP width {config.intermediate_size}",
            )

    def _prepare(self, fresh: bool) -> None:
        """Empty ``out`` if asked; files that are not of a demo are not written over."""
        files = [self.out / name for name in run_report.FILES]
        if fresh:
            for mixer in _MIXERS:
                delete_checkpoints(self.out / mixer)
            delete(files)
        if any(latest_checkpoint(self.out / mixer) for mixer in _MIXERS):
            return
        for file in files:
            if file.exists():
                raise ValueError(f"{file} exists, of something else than an unfinished demo: {_REMEDY}")

    def _trainer(self, mixer: str, config: LanguageModelConfig, console: Console) -> Trainer:
        torch.manual_seed(self.training.seed)
        model = LanguageModel(config, backend=self.backend)
        trainer = Trainer(model, self.corpus, self.training, out=self.out / mixer, device=self.device)
        try:
            resumed = trainer.resume()
        except ValueError as error:
            raise ValueError(f"{error}; {_REMEDY}") from error
        if resumed and not trainer.finished:
            say(console, f"{_MIXERS[mixer]:<9} goes on from step {trainer.progress.step}")
        return trainer

    def _train(self, trainer: Trainer, name: str, console: Console) -> bool:
        finished = run_shown(trainer, name, console)
        if not finished:
            say(
                console,
                f"Stopped after step {trainer.progress.step} of {name}; a checkpoint is in {trainer.out}. "
                "Give the same command again to go on.",
            )
        return finished

    def _conclude(self, trainers: dict[str, Trainer], console: Console, *, again: bool) -> None:
        reports = [run_report.RunReport.of(_MIXERS[mixer], trainer) for mixer, trainer in trainers.items()]
        prompt = _prompt(self.corpus)
        for mixer, trainer in trainers.items():
            tokens = generate(
                trainer.model, prompt, _SAMPLE_BYTES, temperature=_SAMPLE_TEMPERATURE, top_p=_SAMPLE_TOP_P, seed=0
            )
            console.rule(f"{_MIXERS[mixer]} goes on from validation text")
            say(console, printable(decode(tokens[0])))
        console.rule()
        console.print(run_report.table(reports))
        say(console, run_report.verdict(reports))
        if again:
            say(console, f"This demo had ended before: its files are in {self.out}, and --fresh trains anew.")
            return
        run_report.save_curves(self.out, reports, f"Byte language models on {self.corpus.name}", console)
        # last: its presence says that the demo came to its end
        run_report.write_json(self.out, reports, self.corpus, self.device)
        say(console, f"Numbers in {self.out / run_report.REPORT}")


def printable(text: str) -> str:
    """Text without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _prompt(corpus: Corpus) -> torch.Tensor:
    """The first line of the validation text, cut to a few bytes, int64 ``[1, n]``."""
    start = bytes(corpus.validation[:_PROMPT_BYTES].tolist())
    line = start.lstrip().split(b"\n")[0] or start
    return torch.tensor([list(line)], dtype=torch.int64)
