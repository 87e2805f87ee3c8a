"""``hypermlp study``: does it work? The paper's controlled study again, with seeds and intervals."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hypermlp_lab.console import INTERRUPTED, Data, Device, chosen_device, require, say, user_errors
from hypermlp_lab.study.answer import headline
from hypermlp_lab.study.models import budget
from hypermlp_lab.study.plan import pending
from hypermlp_lab.study.presets import MAD, Preset
from hypermlp_lab.study.presets import preset as preset_of
from hypermlp_lab.study.report import PAGE, write
from hypermlp_lab.study.results import Results
from hypermlp_lab.study.runner import Runner
from hypermlp_lab.study.runs import TEXT, Job, corpus_of, halves
from hypermlp_lab.training.files import check_folder

app = typer.Typer(help="The paper's study again: variants of attention on small tasks and text, with seeds.")

RESULTS = Path("runs/study")

PresetName = Annotated[str, typer.Option("--preset", help="smoke (a minute), cpu (hours on 2 cores), full (a GPU).")]
Out = Annotated[Path | None, typer.Option(help="Folder of the records. Default: runs/study/PRESET.")]
Processes = Annotated[int, typer.Option(min=1, max=256, help="Runs at a time.")]
Threads = Annotated[int, typer.Option(min=1, max=256, help="CPU threads of each run.")]


@app.command()
@user_errors()
def mad(
    preset: PresetName = "cpu",
    out: Out = None,
    processes: Processes = 2,
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """Six synthetic tasks: recall, noisy and fuzzy recall, selective copying, memorization, compression.

    Given again, the command goes on where it stopped: a run is done once, and a kill loses the runs at hand.
    """
    chosen = preset_of(preset, device=str(chosen_device(device)))
    _run(chosen, MAD, chosen.tasks, out, processes, threads)


@app.command()
@user_errors()
def text(
    preset: PresetName = "cpu",
    data: Data = None,
    out: Out = None,
    processes: Processes = 2,
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """Byte language models: loss on unseen text against tokens and CPU time."""
    chosen = preset_of(preset, data=None if data is None else str(data), device=str(chosen_device(device)))
    for part in halves(corpus_of(chosen.text.data)):
        part.check_length(chosen.text.seq_len)
    _run(chosen, TEXT, (chosen.text,), out, processes, threads)


@app.command()
@user_errors()
def report(
    preset: PresetName = "cpu",
    out: Out = None,
    data: Data = None,
    device: Device = "cpu",
    pictures: Annotated[Path | None, typer.Option(help="Folder that gets the pictures as SVG, too.")] = None,
) -> None:
    """One HTML page and pictures of what is done so far, in the folder `report` beside the records."""
    require("a report", "scipy", "jinja2", "matplotlib")
    chosen = preset_of(preset, data=None if data is None else str(data), device=str(chosen_device(device)))
    out = RESULTS / preset if out is None else out
    check_folder(out / "report", PAGE)
    if pictures is not None:
        check_folder(pictures)
    results = Results.read(chosen, out)
    if not results.records:
        raise ValueError(f"no records in {out}: run hypermlp study mad or text with {_same(preset, out)} first")
    page = write(results, out / "report", pictures)
    for line in headline(results):
        typer.echo(line)
    typer.echo(f"Page: {page}")


def _run(preset: Preset, name: str, jobs: tuple[Job, ...], out: Path | None, processes: int, threads: int) -> None:
    log = partial(say, Console())
    out = RESULTS / preset.name if out is None else out
    file = out / f"{name}.jsonl"
    check_folder(out, file.name)
    log(f"Parameters on {jobs[0].name}:")
    for line in dict.fromkeys(
        budget(run.label, run.job.size, run.heads) for run in pending(preset, jobs[:1], {})[0] if run.seed == 0
    ):
        log(line)
    if not Runner(preset, jobs, file, processes, threads, log).run():
        log("Stopped. The same command goes on from here.")
        raise typer.Exit(INTERRUPTED)
    log(f"All runs are done: {file}. Next: hypermlp study report {_same(preset.name, out)}")


def _same(preset: str, out: Path) -> str:
    """Options of another command for the same study, to copy."""
    return shlex.join(["--preset", preset, "--out", str(out)])
