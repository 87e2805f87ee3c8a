"""Pictures of the study."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hypermlp_lab.page import blank
from hypermlp_lab.study.claims import COMPONENTS, published
from hypermlp_lab.study.plan import Variant
from hypermlp_lab.study.results import TASKS_MEASURE, Results
from hypermlp_lab.study.runs import TEXT
from hypermlp_lab.study.statistics import Estimate, estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# of Okabe and Ito, told apart by colour-blind readers
_COLORS = {"S-pc": "#d55e00", "R-cg-q-12o": "#009e73", "G-cg-q-12o": "#0072b2"}
_GREY = "#777777"
_Axis = Callable[[dict[str, float]], float]


def figures(results: Results) -> dict[str, tuple[str, Figure]]:
    """All pictures by name, with what they show in a sentence."""
    return {
        "variants": ("Every variant at its best setting, with 95 % intervals over seeds.", overview(results)),
        "effect-tasks": (
            "What each component adds on the six tasks, paired by seed. Right of zero: it helps.",
            forest(results, TASKS_MEASURE),
        ),
        "effect-text": ("What each component adds on text. Right of zero: it helps.", forest(results, TEXT)),
        "text": ("Loss on unseen text while training, against tokens and against CPU time.", text_curves(results)),
        "tasks": ("Share of right answers while training, by task.", task_curves(results)),
    }


def overview(results: Results) -> Figure:
    """Means and intervals of all variants: tasks on the left, text on the right."""
    names = [variant.name for variant in results.variants]
    figure = blank(0.9 + 0.3 * len(names))
    for index, (measure, title) in enumerate(((TASKS_MEASURE, "six tasks, % right"), (TEXT, "text, nats a byte"))):
        axes = figure.add_subplot(1, 2, index + 1, title=title)
        for row, name in enumerate(names):
            _interval(axes, row, estimate(list(results.scores(name, measure).values())), _COLORS.get(name, _GREY))
        _rows(axes, names if not index else [""] * len(names))
    return figure


def forest(results: Results, measure: str) -> Figure:
    """The advantage that each component gives."""
    figure = blank(1.1 + 0.32 * len(COMPONENTS))
    unit = "nats a byte less" if measure == TEXT else "percent points more right"
    axes = figure.add_subplot(xlabel=f"advantage: {unit}")
    axes.axvline(0, color="black", linewidth=0.8)
    for row, (_, better, other) in enumerate(COMPONENTS):
        _interval(axes, row, results.advantage(better, other, measure), "#0072b2")
        paper = published(better, other, TASKS_MEASURE) if measure == TASKS_MEASURE else None
        if paper is not None:
            axes.plot(paper, row, "x", color="#d55e00", markersize=5)
    if measure == TASKS_MEASURE:
        axes.plot([], [], "x", color="#d55e00", label="the paper (its own tasks' sizes, one run)")
        axes.legend(loc="lower right", fontsize=7)
    _rows(axes, [name for name, *_ in COMPONENTS])
    return figure


def text_curves(results: Results) -> Figure:
    """Validation loss of the main variants against tokens and CPU seconds, a faint line a seed."""
    job = results.preset.text
    figure = blank(5.4)
    sides: tuple[tuple[str, _Axis], ...] = (
        ("bytes read", lambda point: point["step"] * job.batch_size * job.seq_len),
        ("CPU seconds of training", lambda point: point["cpu_seconds"]),
    )
    for index, (label, x) in enumerate(sides):
        axes = figure.add_subplot(2, 1, index + 1, xlabel=label, ylabel="nats a byte")
        for name, color in _COLORS.items():
            curves = results.curves(Variant(name), job)
            # the loss before training is that of the start, and would press all else together
            _curves(axes, [curve[1:] for curve in curves], x, color, name)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    return figure


def task_curves(results: Results) -> Figure:
    """Accuracy of the main variants on every task, a faint line a seed."""
    figure = blank(6.6)
    for index, task in enumerate(results.tasks):
        job = next(job for job in results.preset.tasks if job.name == task)
        axes = figure.add_subplot(3, 2, index + 1, title=task)
        assert job.task is not None
        axes.axhline(100 * job.task.chance, color=_GREY, linestyle=":", linewidth=1)
        for name, color in _COLORS.items():
            curves = results.curves(Variant(name), job)
            percent = [[point | {"score": 100 * point["score"]} for point in curve] for curve in curves]
            _curves(axes, percent, lambda point: point["step"], color, name)
        axes.set_ylim(0, 102)
        axes.tick_params(labelsize=7)
        axes.title.set_fontsize(9)
        if index == 0 and len(axes.lines) > 1:
            axes.legend(fontsize=7)
    figure.supxlabel("training step", fontsize=9)
    figure.supylabel("% of the answers right", fontsize=9)
    return figure


def _interval(axes: Any, row: int, found: Estimate | None, color: str) -> None:
    if found is None:
        axes.text(0.02, row, "no data", transform=axes.get_yaxis_transform(), fontsize=7, va="center", color=_GREY)
        return
    if found.count > 1:
        axes.plot([found.t_low, found.t_high], [row, row], color=color, linewidth=0.8)
        axes.plot([found.low, found.high], [row, row], color=color, linewidth=3, alpha=0.6)
    axes.plot(found.mean, row, "o", color=color, markersize=4)


def _rows(axes: Any, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=7)
    axes.title.set_fontsize(9)
    axes.grid(alpha=0.3, axis="x")


def _curves(axes: Any, curves: list[list[dict[str, float]]], x: _Axis, color: str, label: str) -> None:
    if not curves:
        return
    for curve in curves:
        axes.plot([x(point) for point in curve], [point["score"] for point in curve], color=color, alpha=0.3, lw=0.8)
    # a run that diverged has a shorter curve: the mean goes as far as all do
    count = min(len(curve) for curve in curves)
    points = list(zip(*(curve[:count] for curve in curves), strict=True))
    mean = [
        [sum(x(point) for point in each) / len(each) for each in points],
        [sum(point["score"] for point in each) / len(each) for each in points],
    ]
    axes.plot(*mean, color=color, lw=1.8, label=label)
