"""Intervals, verdicts and tables, against values computed another way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from hypermlp_lab.study import answer
from hypermlp_lab.study.claims import CLAIMS, COMPONENTS, Claim
from hypermlp_lab.study.plan import BEST, COMMON, VARIANTS, Variant
from hypermlp_lab.study.results import TASKS_MEASURE
from hypermlp_lab.study.runs import TEXT, Run
from hypermlp_lab.study.statistics import bootstrap, estimate, paired, verdict, verdict_on_level
from tests.study.fakes import study


def test_intervals_are_those_of_scipy() -> None:
    values = [0.2, 0.5, 0.35, 0.9, 0.41]
    found = estimate(values)
    assert found is not None
    assert found.mean == pytest.approx(sum(values) / 5)
    drawn = scipy.stats.bootstrap((values,), np.mean, n_resamples=100_000, method="percentile", rng=0)
    assert (found.low, found.high) == pytest.approx(tuple(drawn.confidence_interval), abs=0.01)
    student = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.t_low, found.t_high) == pytest.approx(tuple(student))


def test_many_values_are_resampled() -> None:
    x = np.random.default_rng(1).normal(3, 1, 40)
    low, high = bootstrap(x)
    half = 1.96 * x.std() / 40**0.5
    assert (low, high) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.03)


def test_few_values() -> None:
    assert estimate([]) is None
    one = estimate([2.0])
    assert one is not None
    assert one.mean == 2
    assert math.isnan(one.low)
    assert one.sign == 0
    for count in (2, 3):
        same = estimate([2.0] * count)
        assert same is not None
        assert (same.low, same.high, same.sign) == (2, 2, count - 2)


def test_a_verdict_needs_both_intervals() -> None:
    clear = paired({0: 1.0, 1: 1.1, 2: 0.9}, {0: 0.0, 1: 0.1, 2: 0.0, 3: 9.0})
    assert clear is not None
    assert clear.count == 3
    assert verdict(clear) == "agrees"
    assert verdict(paired({0: 0.0, 1: 0.1, 2: 0.0}, {0: 1.0, 1: 1.1, 2: 0.9})) == "disagrees"
    # all three above zero, so the bootstrap is, too; Student's is not
    weak = estimate([0.01, 0.5, 1.0])
    assert weak is not None
    assert weak.low > 0 > weak.t_low
    assert verdict(weak) == "not decided at this size"
    assert verdict(None) == "no data"
    assert verdict_on_level(estimate([0.01, -0.01, 0.0]), 0.1) == "agrees"
    assert verdict_on_level(estimate([0.51, 0.49, 0.5]), 0.1) == "disagrees"
    assert verdict_on_level(estimate([0.5, -0.5, 0.0]), 0.1) == "not decided at this size"


def test_claims_and_components_are_of_the_study() -> None:
    names = {variant.name for tier in VARIANTS for variant in tier}
    for _, better, other in COMPONENTS:
        assert {better, other} <= names
    for claim in CLAIMS:
        assert {claim.better, claim.other} <= names
        assert claim.published(TEXT) is not None
    glu = Claim("", "G-cg-q-12o", "S-pc")
    assert glu.published(TASKS_MEASURE) == pytest.approx(81.12 - 80.15)
    assert glu.published(TEXT) == pytest.approx(3.0466 - 2.9865)


def noise(run: Run) -> float:
    """The same for both of a pair: a paired difference does not see it."""
    return 0.05 * run.seed


def fake_score(run: Run) -> float:
    """HyperGLU is 0.2 better at its best on everything, and at lr 1e-3 alone."""
    gain = 0.2 if run.label == "G-cg-q-12o" and run.lr == 1e-3 else 0.0
    start = 0.01 if run.start == "gpt" else 0.0
    if run.job.name == TEXT:
        return 2 - gain - start + noise(run)
    return 0.3 + gain + start + noise(run) % 0.2


def test_results_of_a_whole_study() -> None:
    results = study(fake_score)
    assert sum(results.missing.values()) == results.foreign == 0
    for measure, scale in ((TASKS_MEASURE, 100), (TEXT, 1)):
        found = results.advantage("G-cg-q-12o", "S-pc", measure)
        assert found is not None
        assert found.mean == pytest.approx(0.2 * scale)
        assert (found.low, found.high) == pytest.approx((found.mean, found.mean))
        assert verdict(found) == "agrees"
        common = results.advantage("G-cg-q-12o", "S-pc", measure, COMMON)
        assert common is not None
        assert common.mean == pytest.approx(0)
    # the mean over tasks, in percent, seed by seed
    assert results.scores("S-pc", TASKS_MEASURE) == pytest.approx({s: 31 + 5 * s % 20 for s in range(5)})
    assert results.scores("S-pc", TEXT) == pytest.approx({s: 1.99 + 0.05 * s for s in range(3)})
    chosen = results.setting(Variant("G-cg-q-12o"), results.preset.text)
    assert chosen is not None
    assert (chosen.lr, chosen.start) == (1e-3, "gpt")
    fixed = results.setting(Variant("G-cg-q-12o@paper"), results.preset.text)
    assert fixed is not None
    assert fixed.start == "paper"
    better = results.advantage("S-pc@gpt", "S-pc@reset", TASKS_MEASURE)
    assert better is not None
    assert better.mean == pytest.approx(1)
    lines = answer.headline(results)
    assert "HyperGLU is better" in lines[0]
    assert "+20.0 [+20.0, +20.0] points, 5 seeds" in lines[0]
    assert "not complete" not in " ".join(lines)
    rows = answer.claims_table(results).rows
    assert len(rows) == 2 * len(CLAIMS)
    assert rows[0][3:6] == ["+0.97", "+20.0 [+20.0, +20.0] (5 seeds)", "agrees"]
    for which in (BEST, COMMON):
        assert all("no data" not in cell for row in answer.scores_table(results, which).rows for cell in row)
    # nothing is left out: every run of the sweep has a row
    swept = [run for run in results.records if run.seed == results.preset.sweep_seed]
    assert len(answer.sweep_table(results).rows) == len(swept)


def test_the_sweep_is_listed_in_one_order() -> None:
    """Whatever order a set gives its members in, which is another in every process."""
    results = study(fake_score, weight_decays=(0.0, 0.1))
    for job in results.jobs:
        runs = [run for run, _ in results.swept(job)]
        assert {run.weight_decay for run in runs} == {0.0, 0.1}
        assert runs == sorted(
            runs, key=lambda run: (run.label, run.start, run.lr, run.table_lr, run.weight_decay, run.heads)
        )


def test_where_softmax_wins_it_says_so() -> None:
    results = study(lambda run: fake_score(run) + (0.5 if run.label == "S-pc" else 0.0))
    assert "HyperGLU is worse" in answer.headline(results)[0]
    # on text more is worse
    assert "HyperGLU is better" in answer.headline(results)[1]


@pytest.mark.parametrize("most", [0, 1, 40, 120, 200])
def test_an_incomplete_study_says_so(most: int) -> None:
    results = study(fake_score, most=most)
    text = " ".join(answer.headline(results))
    assert ("Nothing has been measured" if most == 0 else "not complete") in text
    for table in (answer.claims_table(results), answer.components_table(results), answer.scores_table(results, BEST)):
        assert "no data" in table.markdown()
    assert "not chosen yet" in answer.settings_table(results).markdown() or most == 200


def test_a_seed_without_one_of_the_tasks_has_no_mean() -> None:
    results = study(fake_score)
    gone = next(r for r in results.records if r.seed == 3 and r.label == "S-pc" and r.job == results.preset.tasks[1])
    less = type(results)(results.preset, {run: r for run, r in results.records.items() if run != gone})
    which = BEST if 3 not in less.scores("S-pc", less.tasks[1], BEST) else COMMON
    assert set(less.scores("S-pc", TASKS_MEASURE, which)) == {0, 1, 2, 4}
    assert sum(less.missing.values()) == 1
    assert "4 of 5 seeds" in answer.scores_table(less, which).markdown()
