"""The decoding report as a table, a plot and Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypermlp_lab.bench import report as common

if TYPE_CHECKING:
    from rich.table import Table

_TITLE = "Milliseconds per token"
_MIB = 2**20


def header(report: dict[str, Any]) -> list[str]:
    return [
        "context", "layer", "parameters", "ms/token", "quartiles",
        *(f"x {name}" for name in common.baselines(report)), "cache bytes/token", "cache MiB",
    ]  # fmt: skip


def table_rows(report: dict[str, Any]) -> Iterator[list[str]]:
    """One line of text cells for each row; a skipped one says so in place of its time."""
    width = len(header(report))
    for row in report["rows"]:
        start = [f"{row['length']}", row["provider"]]
        if row["skipped"] is not None:
            yield [*start, "", "skipped", *[""] * (width - 4)]
            continue
        low, high = row["quartiles_ms"]
        ratios = [row["time_ratio"].get(name) for name in common.baselines(report)]
        held = row["cache_bytes"]
        yield [
            *start,
            f"{row['parameters']:,}",
            f"{row['median_ms']:.3f}",
            f"{low:.3f} to {high:.3f}",
            *("" if ratio is None else f"{ratio:.3g}" for ratio in ratios),
            "none" if held is None else f"{row['cache_bytes_per_token']:,}",
            "none" if held is None else f"{held / _MIB:.1f}",
        ]


def rich_table(report: dict[str, Any]) -> Table:
    """The table for a terminal."""
    return common.rich_table(_TITLE, report, header(report), table_rows(report))


def markdown(report: dict[str, Any]) -> str:
    """The table for the documentation, with the conditions it holds under."""
    return common.markdown_tables(report, {_TITLE: (header(report), table_rows(report))})


def plot(report: dict[str, Any], path: Path) -> None:
    """Time per token and memory of the cache against the context, one curve for each provider."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    speed, memory = figure.subplots(1, 2, sharex=True)
    for index, name in enumerate(report["providers"]):
        rows = [row for row in report["rows"] if row["provider"] == name and row["skipped"] is None]
        if not rows:
            continue
        lengths = [row["length"] for row in rows]
        color = f"C{index}"
        style = {"marker": common.MARKERS[index % len(common.MARKERS)], "color": color, "label": name, "markersize": 5}
        speed.plot(lengths, [row["median_ms"] for row in rows], **style)
        low, high = zip(*(row["quartiles_ms"] for row in rows), strict=True)
        speed.fill_between(lengths, low, high, color=color, alpha=0.2, linewidth=0)
        if rows[0]["cache_bytes"] is not None:
            memory.plot(lengths, [row["cache_bytes"] / _MIB for row in rows], **style)
    speed.set(xlabel="context (tokens)", ylabel="ms per token")
    memory.set(xlabel="context (tokens)", ylabel="cache of one layer (MiB)")
    ticks = report["settings"]["lengths"]
    for panel in (speed, memory):
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(ticks, [str(length) for length in ticks])
        panel.grid(alpha=0.3)
    speed.legend(fontsize="small")
    figure.suptitle(common.conditions(report), fontsize="x-small", wrap=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
