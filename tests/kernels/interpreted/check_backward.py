"""The backward kernels in Triton's interpreter against float64 autograd through the reference.

Not collected by name: ``tests/kernels/test_interpreted.py`` runs this file in a process of its own.
"""

import gradients
import pytest
import repairs
import torch
from cases import CASES, HOLES, Case

from hypermlp_kernels import launch
from hypermlp_kernels.backward_plan import Plan
from hypermlp_kernels.backward_tiles import BackwardTile

repairs.repair()
pytestmark = [
    pytest.mark.skipif(not launch.interpreted(), reason="needs TRITON_INTERPRET=1 before triton is imported"),
    pytest.mark.usefixtures("poisoned"),
]
# each of their features is in a quicker case as well
SLOW = {
    "T130-window33", "T130-relu-window", "longer-tables", "one-group", "wide-keys", "rank17-32", "no-mixing-relu",
    "no-diag", "no-identity", "no-gate", "position", "position-relu-longer-tables", "bidirectional-relu", "padding",
    "holes-relu-position", "holes-bidirectional", "packed", "packed-position", "packed-bidirectional", "float32",
    "bfloat16-position", "bfloat16-float32-tables", "float16", "packed-within-masked", "packed-empty-ends",
}  # fmt: skip


def test_slow_cases_exist() -> None:
    assert set(CASES) > SLOW


@pytest.mark.parametrize("name", [pytest.param(x, marks=[pytest.mark.slow] * (x in SLOW)) for x in CASES])
def test_gradients(name: str) -> None:
    case = CASES[name]
    found = gradients.by_kernels(case)
    assert all(x.dtype == torch.promote_types(case.dtype, torch.float32) for x in found.values())
    # beyond its range PyTorch has no answer
    assert gradients.wrong(case, found, comparable=name != "float16-overflow") == {}


NEEDED = {
    "q": ["weight_gradient", "readout_statistic_gradient", "map_gradient", "turn"],
    "k": ["weight_gradient", "readout_statistic_gradient", "map_gradient", "turn", "key_product"],
    "v": ["map_gradient", "turn", "key_product"],
    "routing.diag": ["weight_gradient", "readout_statistic_gradient", "map_gradient", "table_gradient"],
    "routing.down": ["weight_gradient", "readout_statistic_gradient", "map_gradient", "table_gradient"],
    "routing.up": ["weight_gradient", "readout_statistic_gradient", "map_gradient", "table_gradient"],
    "routing.core": ["weight_gradient", "readout_statistic_gradient", "map_gradient"],
    "readout.diag": ["weight_gradient", "map_gradient", "table_gradient"],
    "readout.down": ["weight_gradient", "readout_statistic_gradient", "map_gradient", "table_gradient"],
    "readout.up": ["weight_gradient", "table_gradient"],
    "readout.core": ["weight_gradient", "readout_statistic_gradient"],
}
SMALL = Case(dtype=torch.float32, T=18, rows=12, K=4, V=4, R=(2, 2))


def test_nothing_asked_for_launches_nothing(launched: list[str]) -> None:
    assert gradients.by_kernels(SMALL, asked=set()) == {}
    assert launched == []


def test_one_gradient_alone_launches_what_it_needs_and_equals_it_among_all(launched: list[str]) -> None:
    forward = SMALL.kernels()
    everything = gradients.by_kernels(SMALL, forward=forward)
    for name in gradients.NAMES:
        launched.clear()
        alone = gradients.by_kernels(SMALL, asked={name}, forward=forward)
        assert launched == NEEDED[name], name
        assert gradients.same_bits(alone, {name: everything[name]})


CHUNKED = {
    "causal": Case(T=40, H=2, K=4, V=4, R=(2, 2), selection="relu"),
    "window": Case(T=36, K=4, V=4, R=(2, 2), rows=20),
    "bidirectional": Case(T=40, K=4, V=4, R=(2, 2), layout="position", causal=False, selection="relu"),
    "packed": Case(T=40, K=4, V=4, R=(2, 2), bounds=[0, 22, 40], mask=HOLES[:1], selection="relu"),
}


@pytest.mark.parametrize("name", CHUNKED)
@pytest.mark.parametrize(
    ("limit", "span"), [(1, None), *(pytest.param(limit, 1, marks=pytest.mark.slow) for limit in (1, 30_000))]
)
def test_chunks_of_rows_keep_to_the_scratch(
    monkeypatch: pytest.MonkeyPatch, name: str, limit: int, span: int | None
) -> None:
    """Every chunk's part is added in turn, and nothing that a chunk leaves behind is read by the next."""
    case = CHUNKED[name]
    chunks, scratch = [], []
    of = Plan.chunks
    monkeypatch.setattr(Plan, "chunks", lambda *args: chunks.append(list(of(*args))) or chunks[-1])
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: scratch.append(empty(*args, **kwargs)) or scratch[-1])
    tile = BackwardTile(16, 16, 16, 16, 16, 1, 1)
    found = gradients.by_kernels(case, tile=tile, scratch_bytes=limit, span=span)
    largest = max(x.nbytes for x in scratch if x.ndim == 1)
    assert len(chunks[0]) > 2
    most = -(-case.T // 16) if case.rows is None else 1 + -(-(case.rows - 1) // 16)
    maps = 1 + (case.selection == "glu")
    # of one block: tiles, and for each part what a row sums up for 16 channels of its maps
    needed = most * ((2 + maps) * 16 + maps * 16 * bool(span)) * 16 * 8
    assert largest <= max(limit, needed)
    assert all(x < 1e-12 for x in gradients.errors(found, gradients.by_reference(case)).values())


@pytest.mark.parametrize("span", [None, 1])
def test_large_tiles(span: int | None) -> None:
    """Of 64 rows, in whose bfloat16 ``map_gradient`` turns halves of tiles."""
    case = Case(dtype=torch.bfloat16, T=150)
    found = gradients.by_kernels(case, tile=BackwardTile(64, 64, 64, 16, 16, 1, 1), span=span)
    assert gradients.wrong(case, found) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_every_run(dtype: torch.dtype) -> None:
    case = Case(dtype=dtype, R=(2, 2), K=4, V=4, mask=HOLES[:1], selection="relu")
    assert gradients.same_bits(gradients.by_kernels(case), gradients.by_kernels(case))


def test_packed_neighbours_do_not_meet() -> None:
    """What a sequence's neighbour holds does not reach its gradients; rows that see what is not finite have none."""
    case = Case(dtype=torch.float32, bounds=[0, 17, 40], rows=12, K=4, V=4, R=(2, 2))
    streams = {"q", "k", "v", "routing.core", "readout.core"}
    together = gradients.by_kernels(case, asked=streams)
    for x in (case.q, case.k, case.v):
        x[:, :17] = float("nan")
    found = gradients.by_kernels(case, asked=streams)
    assert not found["q"][:, :17].any()
    assert gradients.same_bits({n: x[:, 17:] for n, x in found.items()}, {n: x[:, 17:] for n, x in together.items()})


def test_rows_below_eps_give_no_gradient_to_the_norm() -> None:
    case = Case(T=20, K=4, V=4, R=(2, 2))
    case.q[:, 10:] *= 0
    errors = gradients.errors(gradients.by_kernels(case), gradients.by_reference(case))
    assert all(x < 1e-12 for x in errors.values())
