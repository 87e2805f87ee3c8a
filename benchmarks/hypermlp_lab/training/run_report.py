"""What came out of training: a table, a JSON file and a picture."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hypermlp_lab.console import say
from hypermlp_lab.page import blank, png
from hypermlp_lab.training import files
from hypermlp_lab.training.data import Corpus
from hypermlp_lab.training.trainer import Trainer

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.table import Table

REPORT, CURVES = FILES = ("report.json", "curves.png")


@dataclass(frozen=True)
class RunReport:
    """One trained model.

    Attributes:
        name: of the model.
        parameters: their number.
        bits_per_byte: on the validation windows, after the last step.
        tokens_per_second: of training, evaluations apart.
        peak_memory: bytes, None if not known.
        history: see :class:`~hypermlp_lab.training.trainer.Progress`.
        model, training: the configurations.
    """

    name: str
    parameters: int
    bits_per_byte: float
    tokens_per_second: float
    peak_memory: int | None
    history: list[dict[str, float]]
    model: dict[str, Any]
    training: dict[str, Any]

    @classmethod
    def of(cls, name: str, trainer: Trainer) -> RunReport:
        """The report of a run that has been evaluated."""
        progress = trainer.progress
        return cls(
            name,
            trainer.model.num_parameters(),
            progress.history[-1]["bits_per_byte"],
            trainer.tokens_per_second,
            progress.peak_memory,
            progress.history,
            trainer.model.config.to_dict(),
            trainer.config.to_dict(),
        )


def table(reports: list[RunReport]) -> Table:
    """The runs side by side."""
    from rich.table import Table

    result = Table("model", title="Validation loss after training")
    for heading in ("parameters", "bits per byte", "tokens/s", "peak memory"):
        result.add_column(heading, justify="right")
    for report in reports:
        memory = "unknown" if report.peak_memory is None else f"{report.peak_memory / 2**20:,.0f} MiB"
        row = (f"{report.parameters:,}", f"{report.bits_per_byte:.4f}", f"{report.tokens_per_second:,.0f}", memory)
        result.add_row(report.name, *row)
    return result


def verdict(reports: list[RunReport]) -> str:
    """One sentence: which of the models is better, whichever it is."""
    ranked = sorted(reports, key=lambda report: report.bits_per_byte)
    first, second = ranked[:2]
    gap = second.bits_per_byte - first.bits_per_byte
    if f"{gap:.4f}" == "0.0000":
        return f"{first.name} and {second.name} end level."
    return f"{first.name} ends lower than {second.name} by {gap:.4f} bits per byte (one seed)."


def write_json(out: Path, reports: list[RunReport], corpus: Corpus, device: torch.device) -> None:
    """Everything the table and the picture are made from, with versions and machine."""
    content = {
        "data": corpus.name,
        "device": str(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "models": [vars(report) for report in reports],
    }
    files.write_json(out / REPORT, content)


def save_curves(out: Path, reports: list[RunReport], title: str, console: Console) -> None:
    """Draw the validation curves, or say what is missing to do so."""
    try:
        files.replace_file(out / CURVES, png(_curves(reports, title)))
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        say(console, 'No picture of the curves: matplotlib is missing: in a clone, pip install -e ".[lab]"')
    else:
        say(console, f"Validation curves in {out / CURVES}")


def _curves(reports: list[RunReport], title: str) -> Figure:
    """Validation curves of all runs."""
    from matplotlib.ticker import MaxNLocator

    figure = blank(4.5, width=7)
    axes = figure.add_subplot(
        xlabel="training step", ylabel="validation loss (bits per byte)", title=title, yscale="log"
    )
    for report, color in zip(reports, ("#0072b2", "#d55e00", "#009e73", "#cc79a7"), strict=False):
        steps = [point["step"] for point in report.history]
        bits = [point["bits_per_byte"] for point in report.history]
        axes.plot(steps, bits, "o-", color=color, markersize=3, label=f"{report.name}: {bits[-1]:.3f}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3, which="both")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend()
    return figure
