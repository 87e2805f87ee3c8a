"""What came out: scores by variant, measure and seed, from records of runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any

from hypermlp_lab.study import ledger
from hypermlp_lab.study.plan import BEST, COMMON, Cell, Records, Variant, cells, chosen, pending, reported, search
from hypermlp_lab.study.presets import MAD, Preset
from hypermlp_lab.study.runs import TEXT, Job, Run
from hypermlp_lab.study.statistics import Estimate, paired

# all tasks together: the mean over tasks, of each the mean over its settings
TASKS_MEASURE = "tasks"
_PERCENT = 100
_TENTH = 0.1


@dataclass(frozen=True)
class Results:
    """A study as far as it is.

    Args:
        preset: what was planned.
        records: what is done; other runs in it are left out, and counted by :attr:`foreign`.
    """

    preset: Preset
    records: Records

    @classmethod
    def read(cls, preset: Preset, folder: Path) -> Results:
        """The records of both parts in ``folder``."""
        found: dict[Run, dict[str, Any]] = {}
        for part in (MAD, TEXT):
            found |= ledger.read(folder / f"{part}.jsonl")
        return cls(preset, found)

    @property
    def jobs(self) -> tuple[Job, ...]:
        return (*self.preset.tasks, self.preset.text)

    @cached_property
    def cells(self) -> list[tuple[int, Cell]]:
        return cells(self.preset, self.jobs)

    @property
    def variants(self) -> list[Variant]:
        return list(dict.fromkeys(cell.variant for _, cell in self.cells))

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in order."""
        return list(dict.fromkeys(job.name for job in self.preset.tasks))

    @property
    def measures(self) -> list[str]:
        return [TASKS_MEASURE, *self.tasks, TEXT]

    @cached_property
    def missing(self) -> Counter[str]:
        """Runs that are planned and not done, by the name of their job."""
        runs, waiting = pending(self.preset, self.jobs, self.records)
        found: Counter[str] = Counter(run.job.name for run in runs)
        for job, count in waiting.items():
            found[job.name] += count
        return found

    @cached_property
    def planned(self) -> set[Run]:
        """Runs of the plan that are known so far."""
        runs: set[Run] = set()
        for _, cell in self.cells:
            best = reported(self.preset, cell, self.records, BEST) or []
            common = reported(self.preset, cell, self.records, COMMON) or []
            runs |= {*chain(*search(self.preset, cell, self.records)), *best, *common}
        return runs

    @property
    def foreign(self) -> int:
        """Records of another plan."""
        return sum(run not in self.planned for run in self.records)

    @cached_property
    def _scores(self) -> dict[tuple[str, str, str], dict[int, float]]:
        """By setting, variant and measure: seed to score."""
        scores: dict[tuple[str, str, str], dict[int, float]] = {}
        for which in (BEST, COMMON):
            for variant in self.variants:
                by_job = {job: self._of_job(which, Cell(variant, job)) for job in self.jobs}
                scores[which, variant.name, TEXT] = by_job[self.preset.text]
                tasks = {
                    task: _mean([by_job[job] for job in self.preset.tasks if job.name == task]) for task in self.tasks
                }
                for task, values in (*tasks.items(), (TASKS_MEASURE, _mean(list(tasks.values())))):
                    scores[which, variant.name, task] = {seed: _PERCENT * value for seed, value in values.items()}
        return scores

    def _of_job(self, which: str, cell: Cell) -> dict[int, float]:
        runs = reported(self.preset, cell, self.records, which) or []
        return {run.seed: self.records[run]["score"] for run in runs if run in self.records}

    def scores(self, variant: str, measure: str, which: str = BEST) -> dict[int, float]:
        """Seed to score: percent of the answers, or nats a byte for text. Seeds that miss a task are left out."""
        return self._scores[which, variant, measure]

    def advantage(self, first: str, second: str, measure: str, which: str = BEST) -> Estimate | None:
        """By how much ``first`` is better than ``second``, by seed: percent points, or nats less."""
        a, b = self.scores(first, measure, which), self.scores(second, measure, which)
        return paired(b, a) if measure == TEXT else paired(a, b)

    def seeds(self, measure: str) -> int:
        """How many are planned."""
        return self.preset.text_seeds if measure == TEXT else self.preset.task_seeds

    def setting(self, variant: Variant, job: Job) -> Run | None:
        """The chosen setting; None while the sweep is not done."""
        return chosen(self.preset, Cell(variant, job), self.records)

    def curves(self, variant: Variant, job: Job) -> list[list[dict[str, float]]]:
        """Those of the reported runs at the best setting, a list of points each."""
        runs = reported(self.preset, Cell(variant, job), self.records, BEST) or []
        return [self.records[run]["curve"] for run in runs if run in self.records]

    def swept(self, job: Job) -> list[tuple[Run, dict[str, Any]]]:
        """Every run that a setting was chosen by."""
        runs = self.planned & self.records.keys()
        order = attrgetter("label", "start", "lr", "table_lr", "weight_decay", "heads")
        swept = sorted((run for run in runs if run.job == job and run.seed == self.preset.sweep_seed), key=order)
        return [(run, self.records[run]) for run in swept]

    def of_slower_tables(self, job: Job) -> list[float]:
        """By how much a tenth of the learning rate for tables was better in the sweep, all else equal, by variant."""
        sign = _PERCENT if job.higher_is_better else -1
        return [
            sign * (record["selection"] - self.records[replace(run, table_lr=1.0)]["selection"])
            for run, record in self.swept(job)
            if run.table_lr == _TENTH
            and replace(run, table_lr=1.0) in self.records
            and run.heads == self.preset.hyper_heads[0]
        ]

    @property
    def environments(self) -> list[dict[str, Any]]:
        """What the runs were made on, each once, with how many."""
        counts: Counter[tuple[tuple[str, Any], ...]] = Counter(
            tuple(sorted(record["environment"].items())) for record in self.records.values()
        )
        return [dict(items) | {"runs": count} for items, count in counts.most_common()]

    @property
    def diverged(self) -> list[Run]:
        return [run for run, record in self.records.items() if record["diverged_at"]]

    @property
    def cpu_hours(self) -> float:
        return sum(float(record["total_cpu_seconds"]) for record in self.records.values()) / 3600


def _mean(parts: list[dict[int, float]]) -> dict[int, float]:
    """The mean of several scores, of the seeds that have all of them."""
    if not parts:
        return {}
    seeds = set.intersection(*(set(part) for part in parts))
    return {seed: sum(part[seed] / len(parts) for part in parts) for seed in sorted(seeds)}
