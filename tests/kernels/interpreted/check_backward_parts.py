"""Rows split along keys in the backward, in Triton's interpreter, against float64 and against whole rows.

Not collected by name: ``tests/kernels/test_interpreted.py`` runs this file in a process of its own.
"""

import gradients
import pytest
import repairs
import torch
from cases import CASES, HOLES, Case

from hypermlp_kernels import launch
from hypermlp_kernels.backward_tiles import BackwardTile

repairs.repair()
pytestmark = [
    pytest.mark.skipif(not launch.interpreted(), reason="needs TRITON_INTERPRET=1 before triton is imported"),
    pytest.mark.usefixtures("poisoned"),
]
TILE = BackwardTile(32, 16, 32, 16, 16, 1, 1)
NARROW = {"K": 4, "V": 4, "R": (2, 2)}
# by how many tiles of 16 keys there are to a part; 40 tokens are three tiles, of which the first rows have two
ALSO = (
    "T1", "T2", "T15", "T17", "window1", "position", "bidirectional-relu", "holes", "packed-masked",
    "float32-relu", "bfloat16-relu",
)  # fmt: skip
SPLIT = {
    **{name: (CASES[name], 1) for name in ALSO},
    # a window of three tiles and a bit: parts begin and end at any place of it
    "T110-window": (Case(T=110, rows=50, selection="relu", **NARROW), 2),
    "packed-window": (Case(bounds=[0, 1, 40], rows=20, selection="relu", **NARROW), 1),
}
SLOW = {
    **{name: (case, 1) for name, case in CASES.items() if name not in SPLIT},
    "T65-by-two": (CASES["T65"], 2),
    "T150": (Case(T=150), 3),
    "T150-window-glu": (Case(T=150, rows=50), 2),
    "T150-holes": (Case(T=150, rows=90, mask=[[0] * 20 + [1] * 60 + [0] * 20 + [1] * 50]), 2),
}


@pytest.mark.parametrize("name", [*SPLIT, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_gradients(name: str) -> None:
    case, span = (SPLIT | SLOW)[name]
    found = gradients.by_kernels(case, span=span)
    assert gradients.wrong(case, found, comparable=name != "float16-overflow") == {}


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_parts_make_what_whole_rows_make_and_the_same_bits_every_run(dtype: torch.dtype) -> None:
    case = Case(T=50, dtype=dtype, mask=[HOLES[0] + [1] * 10], rows=40, selection="relu", **NARROW)
    forward = case.kernels()
    whole, *split = (gradients.by_kernels(case, forward=forward, tile=TILE, span=span) for span in (100, 1, 1))
    assert gradients.same_bits(*split)
    # by another rounding; of bfloat16 sums are float32, but what they become is rounded on its way to the keys
    allowed = 1e-13 if dtype == torch.float64 else 2e-2
    assert all(x < allowed for x in gradients.errors(split[0], whole).values())
    assert not gradients.same_bits(split[0], whole)


def test_whole_rows_are_what_there_was(launched: list[str]) -> None:
    """The plan splits no row that fits into a part: nothing more is launched, and the bits are the same."""
    case = Case(T=40, selection="relu", **NARROW)
    forward = case.kernels()
    found = gradients.by_kernels(case, forward=forward)
    assert "add_parts" not in launched
    assert gradients.same_bits(found, gradients.by_kernels(case, forward=forward, span=3))
    assert "add_parts" not in launched


ADDED = {
    "q": ["readout_statistic_gradient", "map_gradient", "turn"],
    "k": ["readout_statistic_gradient", "map_gradient"],
    "v": [],
    "routing.core": ["readout_statistic_gradient", "map_gradient"],
    "readout.diag": [],
    "readout.down": ["readout_statistic_gradient"],
    "readout.up": [],
    "readout.core": ["readout_statistic_gradient"],
}


@pytest.mark.parametrize("name", ADDED)
def test_parts_are_added_up_after_the_sums_that_were_asked_for(name: str, launched: list[str]) -> None:
    case = Case(dtype=torch.float32, T=18, rows=12, **NARROW)
    gradients.by_kernels(case, asked={name}, span=1)
    assert [launched[i - 1] for i, kernel in enumerate(launched) if kernel == "add_parts"] == ADDED[name]


def test_nothing_is_added_up_without_a_low_rank_mixing(launched: list[str]) -> None:
    case = Case(T=40, R=(0, 0), selection="relu")
    gradients.by_kernels(case, span=1)
    assert launched.count("add_parts") == 1
    assert launched[launched.index("add_parts") - 1] == "turn"


@pytest.mark.parametrize("sizes", [{"bounds": [0, 3, 40]}, {"B": 2, "T": 36, "selection": "relu"}], ids=str)
def test_sums_of_a_row_do_not_depend_on_its_chunk(sizes: dict, launched: list[str]) -> None:
    """Neither on what an earlier chunk left in the scratch for parts."""
    case = Case(**sizes, **NARROW)
    options = {"asked": {"q", "routing.core", "readout.core"}, "forward": case.kernels(), "tile": TILE, "span": 1}
    together = gradients.by_kernels(case, **options)
    launched.clear()
    alone = gradients.by_kernels(case, **options, scratch_bytes=1)
    # of two blocks of rows, in batch rows or sequences, some have a part more than others
    assert launched.count("map_gradient") > 2
    assert gradients.same_bits(together, alone)
