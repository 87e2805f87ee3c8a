"""Records of a study that nobody ran, with scores that a test chooses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from hypermlp_lab.study.plan import pending
from hypermlp_lab.study.presets import Preset, preset
from hypermlp_lab.study.results import Results
from hypermlp_lab.study.runs import Run

ENVIRONMENT = {"cpu": "none", "torch": "0", "commit": "abc1234", "threads": 1}


def small() -> Preset:
    """Two tasks and text, two learning rates."""
    made = preset("smoke")
    return replace(
        made,
        tasks=made.tasks[:2],
        lrs=(1e-3, 3e-3),
        text_lrs=(1e-3, 3e-3),
        baseline_heads=(4, 2),
        task_seeds=5,
        text_seeds=3,
    )


def record(run: Run, score: float, **more: Any) -> dict[str, Any]:
    """A record of ``run`` with ``score`` on both splits."""
    details = {"score": score, "loss": 1.0}
    curve = [{"step": i, "cpu_seconds": 0.5 * i, "score": score, "loss": 1.0} for i in range(3)]
    return {
        "run": asdict(run), "score": score, "selection": score, "curve": curve, "diverged_at": None,
        "details": {"report": details, "selection": details}, "cpu_seconds": 1.0, "total_cpu_seconds": 2.0,
        "parameters": 1000, "layer_parameters": 100, "environment": ENVIRONMENT,
    } | more  # fmt: skip


def study(score: Callable[[Run], float], *, most: int | None = None, **options: Any) -> Results:
    """A study, whole or of the first ``most`` runs; ``options`` of its preset."""
    plan = replace(small(), **options)
    records: dict[Run, dict[str, Any]] = {}
    while queue := pending(plan, (*plan.tasks, plan.text), records)[0]:
        for run in queue:
            if most is not None and len(records) >= most:
                return Results(plan, records)
            records[run] = record(run, score(run))
    return Results(plan, records)
