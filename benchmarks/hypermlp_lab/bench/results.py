"""A report as tables, a plot, JSON and Markdown; what each benchmark shows is data, at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypermlp_lab.bench.run import Report, Row
from hypermlp_lab.page import blank, saved
from hypermlp_lab.training.files import replace_file

if TYPE_CHECKING:
    from rich.table import Table

_MIB = 2**20
PICTURES = (".png", ".svg", ".pdf")
_SIZES = {"hidden_size": "width", "num_heads": "heads", "batch": "batch"}
# colours and markers for at most this many providers, then they repeat
_MARKERS = "osD^vP*X"
_TITLES = {"forward": "Forward", "forward+backward": "Forward+backward", "decode": "Milliseconds per token"}


@dataclass(frozen=True)
class Column:
    """A column of the table: its head, and its cell for a row that was measured."""

    head: str
    cell: Callable[[Row], str]


@dataclass(frozen=True)
class Panel:
    """One quantity of the plot, against length.

    Attributes:
        label: of its axis.
        value: of a row that was measured; None leaves the row out.
        band: two values that the quartiles lie at.
        ceiling: from the report, a value that nothing goes beyond, and what it is.
    """

    label: str
    value: Callable[[Row], float | None]
    band: Callable[[Row], Sequence[float]] | None = None
    ceiling: Callable[[Report], tuple[float, str]] | None = None


@dataclass(frozen=True)
class Presentation:
    """What a benchmark shows.

    Attributes:
        length, provider: heads of the first two columns.
        before, after: the columns before and behind the ratios; the one that starts with "ms" says what was skipped.
        panels: of the plot.
        ratio: format of the ratios.
        note: a sentence from the report below its tables.
    """

    length: str
    provider: str
    before: tuple[Column, ...]
    after: tuple[Column, ...]
    panels: tuple[Panel, ...]
    ratio: str = ".2f"
    note: Callable[[Report], str] | None = None


def modes(report: Report) -> list[str]:
    return list(dict.fromkeys(row["mode"] for row in report["rows"]))


def columns(report: Report) -> list[Column]:
    """Of the tables, with a ratio for each baseline."""
    layout = LAYOUTS[report["benchmark"]]
    named = {name for row in report["rows"] for name in row.get("time_ratio", {})}

    def ratio(name: str, row: Row) -> str:
        return format(row["time_ratio"][name], layout.ratio) if name in row["time_ratio"] else ""

    start = [
        Column(layout.length, lambda row: str(row["length"])),
        Column(layout.provider, lambda row: row["provider"]),
    ]
    ratios = [Column(f"x {name}", partial(ratio, name)) for name in report["providers"] if name in named]
    return [*start, *layout.before, *ratios, *layout.after]


def table_rows(report: Report, mode: str) -> Iterator[list[str]]:
    """One line of text cells for each row of a mode, by length; a skipped one says so in place of its time."""
    shown = columns(report)
    for row in sorted((row for row in report["rows"] if row["mode"] == mode), key=itemgetter("length")):
        if row["skipped"] is None:
            yield [column.cell(row) for column in shown]
        else:
            empty = ("skipped" if column.head.startswith("ms") else "" for column in shown[2:])
            yield [column.cell(row) for column in shown[:2]] + list(empty)


def conditions(report: Report) -> str:
    """One sentence: on what, with what, how."""
    where, how = report["environment"], report["settings"]
    device = where["accelerator"] or f"{where['cpu']}, {how['threads']} of {where['cores']} cores"
    sizes = (f"{word} {how[name]}" for name, word in _SIZES.items() if isinstance(how.get(name), int))
    return (
        f"{device}; {where['system']}, Python {where['python']}, PyTorch {where['torch']}, commit {where['commit']}; "
        + ", ".join([how["dtype"], *sizes])
    )


def notes(report: Report) -> list[str]:
    """What is said below tables: a line for each layer and length that was not measured, and the layout's note."""
    reasons = {(row["provider"], row["length"]): row["skipped"] for row in report["rows"] if row["skipped"] is not None}
    note = LAYOUTS[report["benchmark"]].note
    return [
        *(f"{name} at T = {length} skipped: {reason}" for (name, length), reason in reasons.items()),
        *([note(report)] if note else []),
    ]


def rich_tables(report: Report) -> Iterator[Table]:
    """One table for each mode, for a terminal; rows of one length together, above the conditions they hold under."""
    from rich import box
    from rich.table import Table

    for mode in modes(report):
        caption = "\n".join([conditions(report), *notes(report)])
        table = Table(title=_TITLES.get(mode, mode), caption=caption, box=box.SIMPLE_HEAD)
        for index, column in enumerate(columns(report)):
            table.add_column(column.head, justify="left" if index == 1 else "right")
        previous = None
        for cells in table_rows(report, mode):
            if previous not in (None, cells[0]):
                table.add_section()
            previous = cells[0]
            table.add_row(*cells)
        yield table


def markdown(report: Report) -> str:
    """Tables for the documentation, with the conditions, the layers that failed and what was skipped."""
    heads = [column.head for column in columns(report)]
    lines = [f"Measured on: {conditions(report)}.", ""]
    for verdict in report["gate"]:
        if not verdict["passed"]:
            lines += [f"**{verdict['provider']} failed its check and was not timed**: {verdict['reason']}.", ""]
    for mode in modes(report):
        lines += [f"**{_TITLES.get(mode, mode)}**", "", f"| {' | '.join(heads)} |"]
        lines += ["| --: | :-- |" + " --: |" * (len(heads) - 2)]
        lines += [f"| {' | '.join(cells)} |" for cells in table_rows(report, mode)]
        lines.append("")
    return "\n".join([*lines, *(f"- {line}" for line in notes(report))])


def plot(report: Report, path: Path) -> None:
    """A column for each mode and a row for each panel (beside each other for one mode), a curve for each provider."""
    panels, shown = LAYOUTS[report["benchmark"]].panels, modes(report)
    across, down = (len(shown), len(panels)) if len(shown) > 1 else (len(panels), 1)
    figure = blank(1 + 3 * down, width=5 * across)
    axes = figure.subplots(down, across, sharex=True, squeeze=False)
    for column, mode in enumerate(shown):
        for row, panel in enumerate(panels):
            drawn = axes[row, column] if len(shown) > 1 else axes[0, row]
            _draw(drawn, panel, report, mode)
            if row == 0:
                drawn.set_title(mode)
    axes[0, 0].legend(fontsize="small")
    figure.suptitle(conditions(report), fontsize="x-small", wrap=True)
    replace_file(path, saved(figure, path.suffix[1:], dpi=120))


def _draw(axes: Any, panel: Panel, report: Report, mode: str) -> None:
    ticks = sorted({row["length"] for row in report["rows"]})
    for index, name in enumerate(report["providers"]):
        measured = (r for r in report["rows"] if (r["provider"], r["mode"], r["skipped"]) == (name, mode, None))
        rows = [row for row in sorted(measured, key=itemgetter("length")) if panel.value(row) is not None]
        if not rows:
            continue
        lengths = [row["length"] for row in rows]
        style = {"marker": _MARKERS[index % len(_MARKERS)], "markersize": 5, "color": f"C{index}", "label": name}
        axes.plot(lengths, [panel.value(row) for row in rows], **style)
        if panel.band is not None:
            axes.fill_between(lengths, *zip(*map(panel.band, rows), strict=True), color=f"C{index}", alpha=0.2, lw=0)
    if panel.ceiling is not None:
        value, label = panel.ceiling(report)
        axes.axhline(value, color="black", linestyle=":")
        axes.annotate(label, (ticks[0], value), fontsize="x-small", va="bottom")
    axes.set(xlabel="T (tokens)", ylabel=panel.label, yscale="log")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(length) for length in ticks])
    axes.grid(alpha=0.3)


def _number(head: str, key: str, spec: str, scale: float = 1.0) -> Column:
    return Column(head, lambda row: "none" if row[key] is None else format(scale * row[key], spec))


def _times(head: str, spec: str) -> tuple[Column, Column]:
    def quartiles(row: Row) -> str:
        return " to ".join(format(value, spec) for value in row["quartiles_ms"])

    return _number(head, "median_ms", spec), Column("quartiles", quartiles)


def _time_panel(label: str) -> Panel:
    return Panel(label, lambda row: float(row["median_ms"]), lambda row: list(row["quartiles_ms"]))


def _ceilings(report: Report) -> str:
    found = report["ceilings"]
    return (
        f"A {found['matmul_size']} x {found['matmul_size']} matrix product ran at {found['matmul_tflops']:.1f} TFLOP/s "
        f"and a copy at {found['copy_gb_per_s']:.0f} GB/s, read and written. Timed by {report['timing']}."
    )


def _rates_at_quartiles(row: Row) -> list[float]:
    return [row["tokens_per_second"] * row["median_ms"] / quartile for quartile in row["quartiles_ms"]]


def _cache_mib(row: Row) -> float | None:
    return None if row["cache_bytes"] is None else float(row["cache_bytes"] / _MIB)


_PARAMETERS = _number("parameters", "parameters", ",d", 1)
_EXTRA_MEMORY = Panel("extra peak memory (MiB)", lambda row: float(row["extra_peak_bytes"] / _MIB))
_RATE = Panel("tokens/s", lambda row: float(row["tokens_per_second"]), _rates_at_quartiles)
_THROUGHPUT = Presentation(
    "T", "layer",
    (_PARAMETERS, *_times("ms", ".1f"), _number("tokens/s", "tokens_per_second", ",.0f")),
    (_number("extra MiB", "extra_peak_bytes", ".1f", 1 / _MIB),),
    (_RATE, _EXTRA_MEMORY),
)  # fmt: skip
LAYOUTS = {
    "attention": _THROUGHPUT,
    "models": _THROUGHPUT,
    "operators": Presentation(
        "T", "operator",
        (
            *_times("ms", ".3f"), _number("TFLOP/s", "tflops", ".1f"), _number("of matmul", "matmul_share", ".0%"),
            _number("GB/s", "gb_per_s", ".0f"),
        ),
        (
            _number("extra MiB", "extra_peak_bytes", ".0f", 1 / _MIB),
            Column("launched", lambda row: str(row["launched"]).split(",")[0]),
        ),
        (
            _time_panel("ms"),
            Panel(
                "TFLOP/s", lambda row: float(row["tflops"]),
                ceiling=lambda report: (report["ceilings"]["matmul_tflops"], "matrix product"),
            ),
        ),
        note=_ceilings,
    ),
    "decode": Presentation(
        "context", "layer",
        (_PARAMETERS, *_times("ms/token", ".3f")),
        (
            _number("cache bytes/token", "cache_bytes_per_token", ",d", 1),
            _number("cache MiB", "cache_bytes", ".1f", 1 / _MIB),
        ),
        (
            _time_panel("ms per token"),
            Panel("cache of one layer (MiB)", _cache_mib),
        ),
        ratio=".3g",
    ),
}  # fmt: skip
