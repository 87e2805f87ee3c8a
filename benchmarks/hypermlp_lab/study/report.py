"""``hypermlp study report``: one page that needs nothing else, pictures, and tables for the documentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypermlp_lab.page import Table, drawn, render
from hypermlp_lab.study import answer, figures
from hypermlp_lab.study.plan import BEST, COMMON
from hypermlp_lab.study.results import Results
from hypermlp_lab.training.files import replace_file

PAGE = "index.html"


def write(results: Results, folder: Path, pictures: Path | None = None) -> Path:
    """Write the page and its pictures into ``folder``; the pictures for the documentation into ``pictures``, too.

    Returns:
        The page's file.
    """
    shown, files = drawn(figures.figures(results))
    written = {folder / name: content for name, content in files.items()}
    if pictures is not None:
        written |= {pictures / f"study-{name}": files[name] for name in files if name.endswith(".svg")}
    # all is drawn before anything is written over
    for file, content in {**written, folder / PAGE: page(results, shown).encode()}.items():
        replace_file(file, content)
    return folder / PAGE


def page(results: Results, pictures: dict[str, dict[str, str]]) -> str:
    """The HTML page, with these pictures in it."""
    preset = results.preset
    return render(
        Path(__file__).parent / "report.html.j2",
        preset=preset.name,
        figures=pictures,
        headline=answer.headline(results),
        claims=answer.claims_table(results),
        components=answer.components_table(results),
        by_task=answer.by_task_table(results),
        best=answer.scores_table(results, BEST),
        common=answer.scores_table(results, COMMON),
        settings=answer.settings_table(results),
        sweep=answer.sweep_table(results),
        jobs=answer.jobs_table(results),
        environments=environments_table(results),
        lrs=_listed(preset.lrs),
        text_lrs=_listed(preset.text_lrs),
        heads=_listed(preset.baseline_heads),
        hyper_heads=_listed(preset.hyper_heads),
        task_seeds=preset.task_seeds,
        text_seeds=preset.text_seeds,
        runs=len(results.records),
        cpu_hours=f"{results.cpu_hours:.1f}",
        diverged=len(results.diverged),
        missing=sum(results.missing.values()),
        foreign=results.foreign,
    )


def environments_table(results: Results) -> Table:
    """Hardware, versions and commits."""
    found: list[dict[str, Any]] = results.environments
    names = list(dict.fromkeys(name for environment in found for name in environment))
    rows = [[str(environment.get(name, "")) for name in names] for environment in found]
    return Table("Hardware, versions and commits, and the runs made with each.", names, rows)


def markdown(results: Results, part: str) -> str:
    """A part of the documentation's page: ``"answer"``, or the tables ``"claims"``, ``"components"``, ...."""
    if part == "answer":
        return "\n\n".join(answer.headline(results)) + "\n"
    tables = {
        "claims": lambda: [answer.claims_table(results)],
        "components": lambda: [answer.components_table(results)],
        "by-task": lambda: [answer.by_task_table(results)],
        "scores": lambda: [answer.scores_table(results, BEST), answer.scores_table(results, COMMON)],
        "settings": lambda: [answer.jobs_table(results), environments_table(results)],
    }
    if part not in tables:
        raise ValueError(f"part must be one of {['answer', *tables]}, got {part!r}")
    return "\n".join(table.markdown() for table in tables[part]())


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
