"""What a training run shows: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from hypermlp_lab.training.trainer import Trainer

# seconds between plain lines
_LINE_EVERY = 15.0


class TrainingDisplay:
    """A :class:`~hypermlp_lab.training.trainer.Watcher` for people, used as a context.

    Args:
        console: where to write.
        name: of the model.
        steps: of the whole run.
        start: steps done before.
    """

    def __init__(self, console: Console, name: str, steps: int, start: int = 0) -> None:
        self.console, self.name, self.steps = console, name, steps
        self.plain = not console.is_terminal
        self._first_step, self._began, self._last_line = start, time.monotonic(), time.monotonic()
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s"),
            TimeRemainingColumn(),
            console=console,
            disable=self.plain,
        )
        self._task: TaskID = self._bar.add_task(name, total=steps, completed=start, loss="-", speed="-")

    def __enter__(self) -> TrainingDisplay:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def on_step(self, step: int, loss: float, tokens_per_second: float) -> None:
        self._bar.update(self._task, completed=step, loss=f"{loss:.3f}", speed=f"{tokens_per_second:,.0f}")
        now = time.monotonic()
        if self.plain and (now - self._last_line >= _LINE_EVERY or step == self.steps):
            self._last_line = now
            left = (now - self._began) / (step - self._first_step) * (self.steps - step)
            self._line(
                f"step {step}/{self.steps}  loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s  {left:.0f} s left"
            )

    def on_evaluation(self, point: dict[str, float]) -> None:
        self._line(f"step {point['step']:.0f}/{self.steps}  validation {point['bits_per_byte']:.4f} bits per byte")

    def _line(self, text: str) -> None:
        self.console.print(f"{self.name:<9} {text}", highlight=False, soft_wrap=True)


def run_shown(trainer: Trainer, name: str, console: Console) -> bool:
    """:meth:`Trainer.run`, shown under this name."""
    with TrainingDisplay(console, name, trainer.config.steps, trainer.progress.step) as watcher:
        trainer.watcher = watcher
        return trainer.run()
