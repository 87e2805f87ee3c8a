"""The operator report as a table, a plot and Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypermlp_lab.bench import report as common

if TYPE_CHECKING:
    from rich.table import Table

_MIB = 2**20


def header(report: dict[str, Any]) -> list[str]:
    return [
        "T", "operator", "ms", "quartiles", "TFLOP/s", "of matmul", "GB/s",
        *(f"x {name}" for name in common.baselines(report)), "extra MiB", "launched",
    ]  # fmt: skip


def table_rows(report: dict[str, Any], mode: str) -> Iterator[list[str]]:
    """One line of text cells for each row of a mode; a skipped one says so in place of its time."""
    width = len(header(report))
    for row in sorted(report["rows"], key=lambda row: int(row["length"])):
        if row["mode"] != mode:
            continue
        start = [str(row["length"]), row["provider"]]
        if row["skipped"] is not None:
            yield [*start, "skipped", *[""] * (width - 3)]
            continue
        low, high = row["quartiles_ms"]
        ratios = [row["time_ratio"].get(name) for name in common.baselines(report)]
        yield [
            *start,
            f"{row['median_ms']:.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{row['tflops']:.1f}",
            f"{row['matmul_share']:.0%}",
            f"{row['gb_per_s']:.0f}",
            *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            f"{row['extra_peak_bytes'] / _MIB:.0f}",
            row["launched"].split(",")[0],
        ]


def ceilings(report: dict[str, Any]) -> str:
    """One sentence: the device at its best, in the same run."""
    found = report["ceilings"]
    return (
        f"A {found['matmul_size']} x {found['matmul_size']} matrix product ran at {found['matmul_tflops']:.1f} TFLOP/s "
        f"and a copy at {found['copy_gb_per_s']:.0f} GB/s, read and written. Timed by {report['settings']['timing']}."
    )


def rich_tables(report: dict[str, Any]) -> Iterator[Table]:
    """One table for each mode, for a terminal."""
    for mode in report["settings"]["modes"]:
        table = common.rich_table(mode, report, header(report), table_rows(report, mode))
        table.caption = f"{table.caption}\n{ceilings(report)}"
        yield table


def markdown(report: dict[str, Any]) -> str:
    """Tables for the documentation, with the conditions they hold under."""
    modes = report["settings"]["modes"]
    tables = {mode.capitalize(): (header(report), table_rows(report, mode)) for mode in modes}
    return f"{common.markdown_tables(report, tables)}\n\n{ceilings(report)}"


def plot(report: dict[str, Any], path: Path) -> None:
    """Time and TFLOP/s against length; a column for each mode."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    modes = report["settings"]["modes"]
    figure = Figure(figsize=(5 * len(modes), 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(modes), sharex=True, squeeze=False)
    ticks = sorted(report["settings"]["lengths"])
    for column, mode in enumerate(modes):
        times, rates = axes[:, column]
        for index, name in enumerate(report["providers"]):
            rows = sorted(
                (r for r in report["rows"] if (r["provider"], r["mode"], r["skipped"]) == (name, mode, None)),
                key=lambda row: int(row["length"]),
            )
            if not rows:
                continue
            lengths = [row["length"] for row in rows]
            style = {"marker": common.MARKERS[index % len(common.MARKERS)], "color": f"C{index}", "markersize": 5}
            times.plot(lengths, [row["median_ms"] for row in rows], label=name, **style)
            low, high = zip(*(row["quartiles_ms"] for row in rows), strict=True)
            times.fill_between(lengths, low, high, color=f"C{index}", alpha=0.2, linewidth=0)
            rates.plot(lengths, [row["tflops"] for row in rows], label=name, **style)
        rates.axhline(report["ceilings"]["matmul_tflops"], color="black", linestyle=":", label="matrix product")
        times.set(title=mode, ylabel="ms", yscale="log")
        rates.set(xlabel="T (tokens)", ylabel="TFLOP/s", yscale="log")
        for panel in (times, rates):
            panel.set_xscale("log", base=2)
            panel.set_xticks(ticks, [str(length) for length in ticks])
            panel.grid(alpha=0.3)
    axes[1, 0].legend(fontsize="x-small")
    figure.suptitle(common.conditions(report), fontsize="x-small", wrap=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
