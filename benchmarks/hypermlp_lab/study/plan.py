"""What is run, and in which order: a function of the preset and of what is done, so that a stopped study goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any

from hypermlp.config import HyperConfig
from hypermlp_lab.study.models import STARTS, Start
from hypermlp_lab.study.presets import Preset
from hypermlp_lab.study.runs import Job, Run

# what a run is done for: to choose a setting, at that setting, or at the setting that all share
BEST, COMMON = "best", "common"
Records = Mapping[Run, dict[str, Any]]


@dataclass(frozen=True)
class Variant:
    """A label of the paper's study, perhaps with the authors' start: ``G-cg-q-12o@paper``.

    Args:
        name: the label, and ``@`` with a start where that is fixed and not chosen.
    """

    name: str

    def __post_init__(self) -> None:
        _ = self.config  # ValueError for what is no label
        if self.fixed_start not in (None, *STARTS):
            raise ValueError(f"variant {self.name!r}: the start after @ must be one of {STARTS}")

    @property
    def label(self) -> str:
        return self.name.split("@")[0]

    @property
    def fixed_start(self) -> Start | None:
        return self.name.split("@")[1] if "@" in self.name else None  # type: ignore[return-value]

    @cached_property
    def config(self) -> HyperConfig:
        """Its layer, at some width."""
        return HyperConfig.from_label(self.label, 64)

    @property
    def hyper(self) -> bool:
        """Whether it has sequence mixing or two maps, and so heads of its own kind."""
        return self.config.mixer in ("hyperglu", "hypermlp")

    @property
    def tables_apart(self) -> bool:
        """Whether other learning rates of tables are tried: not where variants are compared by their start alone."""
        return self.fixed_start is None and bool(self.config.routing_mix or self.config.readout_mix)

    @property
    def starts(self) -> tuple[Start, ...]:
        """Those that differ: without convolutions the authors' start is that of GPT-2."""
        if self.fixed_start is not None:
            return (self.fixed_start,)
        return STARTS if self.config.conv_size else STARTS[:2]


# those that the paper's main claim is about come first, so that a part of the study is already an answer
VARIANTS: tuple[tuple[Variant, ...], ...] = tuple(
    tuple(Variant(name) for name in tier.split())
    for tier in (
        "S-pc G-cg-q-12o R-cg-q-12o",
        "G-cg-h-12o R-cg-h-12o",
        "R-cg-q G-cg-q R-cg-q-1o G-cg-q-1o R-12o! R-12! R-pc R-g-q-12o R-c-q-12o",
        "S-pc@paper R-cg-q-12o@paper G-cg-q-12o@paper S-pc@gpt R-cg-q-12o@gpt G-cg-q-12o@gpt",
        "S-pc@reset R-cg-q-12o@reset G-cg-q-12o@reset",
    )
)


@dataclass(frozen=True)
class Cell:
    """One variant on one job."""

    variant: Variant
    job: Job


def cells(preset: Preset, jobs: Iterable[Job]) -> list[tuple[int, Cell]]:
    """All of them, with the tier of each."""
    jobs, tiers = tuple(jobs), VARIANTS if preset.tiers is None else VARIANTS[: preset.tiers]
    return [(tier, Cell(variant, job)) for tier, group in enumerate(tiers) for job in jobs for variant in group]


# of the search for a setting, see search()
_STAGES = 4


def search(preset: Preset, cell: Cell, records: Records) -> list[list[Run]]:
    """The stages of the search for a setting that are known so far, the same for every variant.

    Learning rates and weight decays, each with each, at the library's start and the usual number of heads; then the
    other starts at the best of these; then, where there are tables and the start is not fixed, other learning rates of
    theirs; then other numbers of heads at the best of all.
    """
    usual, *other_heads = _heads(preset, cell.variant)
    first, *other_starts = cell.variant.starts
    table_lrs = preset.table_lrs if cell.variant.tables_apart else ()
    rates = [
        Run(cell.job, cell.variant.label, first, lr, decay, usual, preset.sweep_seed)
        for lr in preset.lrs_of(cell.job)
        for decay in preset.weight_decays
    ]
    changes: list[list[dict[str, Any]]] = [
        [{"start": start} for start in other_starts],
        [{"table_lr": table_lr} for table_lr in table_lrs],
        [{"heads": count} for count in other_heads],
    ]
    stages = [rates]
    for stage in changes:
        best = best_of(list(chain(*stages)), records)
        if best is None:
            break
        stages.append([replace(best, **change) for change in stage])
    return stages


def chosen(preset: Preset, cell: Cell, records: Records) -> Run | None:
    """The setting that is best on the split to choose by. None while that is not known."""
    stages = search(preset, cell, records)
    return best_of(list(chain(*stages)), records) if len(stages) == _STAGES else None


def _heads(preset: Preset, variant: Variant) -> tuple[int, ...]:
    """The usual number, then others."""
    return preset.hyper_heads if variant.hyper else preset.baseline_heads


def reported(preset: Preset, cell: Cell, records: Records, which: str) -> list[Run] | None:
    """The runs whose scores are reported, one a seed. None while their setting is not known."""
    if which == BEST:
        best = chosen(preset, cell, records)
        return None if best is None else [replace(best, seed=seed) for seed in preset.seeds_of(cell.job)]
    if cell.variant.fixed_start is not None:
        return []
    usual = _heads(preset, cell.variant)[0]
    common = Run(
        cell.job, cell.variant.label, "reset", preset.common_lr_of(cell.job), preset.weight_decays[0], usual, 0
    )
    return [replace(common, seed=seed) for seed in preset.seeds_of(cell.job)]


def best_of(runs: list[Run], records: Records) -> Run | None:
    """The run with the best score on the split to choose by; of equal scores, with the lower loss there."""
    if any(run not in records for run in runs):
        return None

    def rank(run: Run) -> tuple[float, float]:
        details = records[run]["details"]["selection"]
        return (-details["score"] if run.job.higher_is_better else details["score"]), details["loss"]

    return min(runs, key=rank)


def pending(preset: Preset, jobs: Iterable[Job], records: Records) -> tuple[list[Run], Counter[Job]]:
    """Runs that can be made now, the most wanted first, and how many more wait for a setting, at most.

    Each tier of variants is swept, then run at its best with one seed after the other; what all variants do
    at the common setting comes last.
    """
    ranks: dict[Run, tuple[int, ...]] = {}
    waiting: Counter[Job] = Counter()

    def want(runs: list[Run], *rank: int) -> None:
        for run in runs:
            if run not in records:
                ranks[run] = min(rank, ranks.get(run, rank))

    for tier, cell in cells(preset, jobs):
        stages = search(preset, cell, records)
        for order, stage in enumerate(stages):
            want(stage, tier, order)
        table_lrs = len(preset.table_lrs) if cell.variant.tables_apart else 0
        later = (0, len(cell.variant.starts) - 1, table_lrs, len(_heads(preset, cell.variant)) - 1)
        best = reported(preset, cell, records, BEST)
        waiting[cell.job] += sum(later[len(stages) :])
        waiting[cell.job] += len(preset.seeds_of(cell.job)) if best is None else 0
        for order, run in enumerate(best or []):
            want([run], tier, _STAGES, order)
        for order, run in enumerate(reported(preset, cell, records, COMMON) or []):
            want([run], len(VARIANTS), order)
    return sorted(ranks, key=ranks.__getitem__), waiting
