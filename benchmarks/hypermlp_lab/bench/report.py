"""A report as a table, a plot, JSON and Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypermlp_lab.bench.measure import MODES

if TYPE_CHECKING:
    from rich.table import Table

_MIB = 2**20
_SIZES = {"hidden_size": "width", "num_heads": "heads", "batch": "batch"}
# colours and markers for at most this many providers, then they repeat
MARKERS = "osD^vP*X"


def write_json(report: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def baselines(report: dict[str, Any]) -> list[str]:
    """Names that times are given as multiples of, in the order of the providers."""
    named = {name for row in report["rows"] for name in row.get("time_ratio", {})}
    return [name for name in report["providers"] if name in named]


def header(report: dict[str, Any]) -> list[str]:
    return [
        "T", "layer", "parameters", "ms", "quartiles", "tokens/s",
        *(f"x {name}" for name in baselines(report)), "extra MiB",
    ]  # fmt: skip


def table_rows(report: dict[str, Any], mode: str) -> Iterator[list[str]]:
    """One line of text cells for each row of a mode; a skipped one says so in place of its time."""
    width = len(header(report))
    for row in report["rows"]:
        if row["mode"] != mode:
            continue
        start = [str(row["length"]), row["provider"]]
        if row["skipped"] is not None:
            yield [*start, "", "skipped", *[""] * (width - 4)]
            continue
        low, high = row["quartiles_ms"]
        ratios = [row["time_ratio"].get(name) for name in baselines(report)]
        yield [
            *start,
            f"{row['parameters']:,}",
            f"{row['median_ms']:.1f}",
            f"{low:.1f} to {high:.1f}",
            f"{row['tokens_per_second']:,.0f}",
            *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            f"{row['extra_peak_bytes'] / _MIB:.1f}",
        ]


def conditions(report: dict[str, Any]) -> str:
    """One sentence: on what, with what, how."""
    where, how = report["environment"], report["settings"]
    device = where["accelerator"] or f"{where['cpu']}, {how['threads']} of {where['cores']} cores"
    return (
        f"{device}; {where['system']}, Python {where['python']}, PyTorch {where['torch']}, commit {where['commit']}; "
        + ", ".join([how["dtype"], *(f"{word} {how[name]}" for name, word in _SIZES.items() if name in how)])
    )


def skipped(report: dict[str, Any]) -> list[str]:
    """Why rows were not measured, one line for each layer and length."""
    reasons = {(row["provider"], row["length"]): row["skipped"] for row in report["rows"] if row["skipped"] is not None}
    return [f"{name} at T = {length} skipped: {reason}" for (name, length), reason in reasons.items()]


def rich_tables(report: dict[str, Any]) -> Iterator[Table]:
    """One table for each mode, for a terminal."""
    for mode in MODES:
        yield rich_table(mode, report, header(report), table_rows(report, mode))


def rich_table(title: str, report: dict[str, Any], names: list[str], rows: Iterable[list[str]]) -> Table:
    """Rows of text cells, those of one length together, above the conditions they hold under."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, caption="\n".join([conditions(report), *skipped(report)]), box=box.SIMPLE_HEAD)
    for index, name in enumerate(names):
        table.add_column(name, justify="left" if index == 1 else "right")
    previous = None
    for cells in rows:
        if previous not in (None, cells[0]):
            table.add_section()
        previous = cells[0]
        table.add_row(*cells)
    return table


def markdown(report: dict[str, Any]) -> str:
    """Tables for the documentation, with the conditions they hold under."""
    tables = {mode.capitalize(): (header(report), table_rows(report, mode)) for mode in MODES}
    return markdown_tables(report, tables)


def markdown_tables(report: dict[str, Any], tables: Mapping[str, tuple[list[str], Iterable[list[str]]]]) -> str:
    """Tables by title, with the conditions, the layers that failed and what was skipped."""
    lines = [f"Measured on: {conditions(report)}.", ""]
    for verdict in report["gate"]:
        if not verdict["passed"]:
            lines += [f"**{verdict['provider']} failed its check and was not timed**: {verdict['reason']}.", ""]
    for title, (names, rows) in tables.items():
        lines += [f"**{title}**", "", f"| {' | '.join(names)} |", "| --: | :-- |" + " --: |" * (len(names) - 2)]
        lines += [f"| {' | '.join(cells)} |" for cells in rows]
        lines.append("")
    lines += [f"- {line}" for line in skipped(report)]
    return "\n".join(lines)


def plot(report: dict[str, Any], path: Path) -> None:
    """Tokens per second and extra peak memory against length, one curve for each provider."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharex=True)
    for column, mode in enumerate(MODES):
        speed, memory = axes[:, column]
        for index, name in enumerate(report["providers"]):
            rows = [
                row for row in report["rows"]
                if row["provider"] == name and row["mode"] == mode and row["skipped"] is None
            ]  # fmt: skip
            if not rows:
                continue
            lengths = [row["length"] for row in rows]
            style = {"marker": MARKERS[index % len(MARKERS)], "color": f"C{index}", "label": name, "markersize": 5}
            tokens = [1e-3 * row["tokens_per_second"] * row["median_ms"] for row in rows]
            speed.plot(lengths, [row["tokens_per_second"] for row in rows], **style)
            # quartiles of the time are quartiles of its inverse, the other way round
            slow = [1e3 * count / row["quartiles_ms"][1] for count, row in zip(tokens, rows, strict=True)]
            fast = [1e3 * count / row["quartiles_ms"][0] for count, row in zip(tokens, rows, strict=True)]
            speed.fill_between(lengths, slow, fast, color=style["color"], alpha=0.2, linewidth=0)
            memory.plot(lengths, [row["extra_peak_bytes"] / _MIB for row in rows], **style)
        speed.set(title=mode, ylabel="tokens/s")
        memory.set(xlabel="T (tokens)", ylabel="extra peak memory (MiB)")
        for panel in (speed, memory):
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(report["settings"]["lengths"], [str(length) for length in report["settings"]["lengths"]])
            panel.grid(alpha=0.3)
    axes[0, 0].legend(fontsize="small")
    figure.suptitle(conditions(report), fontsize="x-small", wrap=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
