"""The cost model: what ``plan.py`` and ``kernels/README.md`` say is what compiled kernels give."""

from collections.abc import Iterable
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed on this platform")

import model_backward
import model_forward
import report_backward
import report_forward
import triton
from report_table import brief_line

from hypermlp_kernels import launch
from hypermlp_kernels.backward_plan import Split
from hypermlp_kernels.plan import COSTS, Cost
from hypermlp_kernels.tiles import Precision

README = Path(__file__).parents[2] / "kernels/README.md"
compiled = pytest.mark.skipif(launch.interpreted(), reason="TRITON_INTERPRET is set: nothing is compiled")
recorded = pytest.mark.skipif(not triton.__version__.startswith("3.7."), reason="counted in the code Triton 3.7 makes")


def assert_shown(lines: Iterable[str]) -> None:
    shown = README.read_text().splitlines()
    missing = [line for line in lines if line not in shown]
    assert not missing, "kernels/README.md is stale: " + "\n".join(missing)


def assert_close(found: Cost, held: Cost) -> None:
    """Within 3 %, or 30 clocks of what is a difference of others."""
    for name, new, old in zip(Cost._fields, found, held, strict=True):
        for one, other in zip(new, old, strict=True) if isinstance(new, tuple) else [(new, old)]:
            assert abs(one - other) <= max(0.03 * other, 30 if other > 100 else 0.3), (name, found, held)


def test_the_choice_of_the_design_is_shown() -> None:
    assert_shown(model_forward.choice_table())


@compiled
@recorded
def test_statistics_cost_what_the_plan_holds() -> None:
    counted = model_forward.counted("bf16", True)
    assert counted["selection_statistics"] == pytest.approx(COSTS["bf16"].select[1], rel=0.03)
    assert_shown(model_forward.pass_table(counted["routing_statistic"]))


@compiled
@recorded
@pytest.mark.slow
@pytest.mark.parametrize("precision", COSTS)
def test_the_plan_holds_what_is_counted(precision: Precision) -> None:
    assert_close(model_forward.cost(precision), COSTS[precision])


@compiled
@recorded
@pytest.mark.slow
def test_the_tiles_are_shown_as_they_compile() -> None:
    for report, paths in ((report_forward, report_forward.CONFIGURATIONS), (report_backward, [model_backward.NAME])):
        for arch in ("sm_80", "sm_90"):
            for path in paths:
                assert_shown(brief_line(arch, path, row) for row in report.rows(arch, path, True))


@compiled
@recorded
@pytest.mark.slow
def test_the_backwards_times_are_shown() -> None:
    clocks = model_backward.counted()
    assert_shown(model_backward.times_table(clocks))
    issue, tensor, flop, moved, moving = list(model_backward.sums_table(clocks))[2].strip("| ").split(" | ")
    text = " ".join(README.read_text().split())
    assert f"{int(issue) / 1000:.1f}k clocks of issue, {int(tensor) / 1000:.1f}k of tensor cores" in text
    assert f"({flop} FLOP for each score of a head) and {moved} bytes of scratch traffic a score" in text
    assert f"which is {int(moving) / 1000:.0f}k clocks at 3 TB/s" in text


def test_the_busiest_processor() -> None:
    """Programs go to whoever is done first, in their order."""
    some = model_backward.MULTIPROCESSORS
    assert model_backward.longest_processor([2.0] * some) == 2
    assert model_backward.longest_processor([1.0] * (some - 1) + [5.0, 1.0]) == 5
    assert model_backward.longest_processor([2.0] * some + [3.0]) == 5


@pytest.mark.parametrize("limit", [2**24, 2**29])
def test_every_launch_takes_every_score_once(limit: int) -> None:
    """Of 3 batch rows of 1024 tokens, whoever owns what: row blocks, keys or table rows."""
    tile = report_backward.tiles_of("sm_90", model_backward.NAME)[0]
    plan = model_backward.plan_of(3, 1024, tile)
    chunks = list(plan.chunks(limit, model_backward.sizes_of(tile), Split(1, 0)))
    assert (len(chunks) > 1) == (limit == 2**24)
    # eight blocks of 128 rows, each with the keys before and in it
    scores = plan.heads * 128 * 128 * 8 * 9 // 2
    # a group above the diagonal has no table rows, and keys are taken 256 at a time
    expected = dict.fromkeys(model_backward.KERNELS, scores)
    expected |= {f"table_gradient of {mix}": scores - plan.heads * 8 * 64 * 64 for mix in ("readout", "routing")}
    expected["weight_gradient"] = plan.heads * 128 * 256 * 2 * (1 + 2 + 3 + 4)
    for name, total in expected.items():
        assert total == sum(s for c in chunks for s in model_backward.programs(name, c, plan, tile, 1024)), name
