"""Time and memory of the chunked path grow with T, not T x T, once a window bounds the lags."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from hypermlp.ops import chunked, flops
from hypermlp.ops.arguments import Needs, OperatorArgs, Options
from hypermlp.ops.chunked.gradient import backward
from hypermlp.ops.varlen import Tokens
from tests.helpers import Case, make_case


class Watch(TorchDispatchMode):
    """Largest storage met, and multiply-adds of the matrix products that were run."""

    largest = 0
    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        name = func.overloadpacket.__name__
        if name.rstrip("_") in ("mm", "bmm", "addmm", "baddbmm"):
            left, right = args[-2:]
            self.flops += 2 * left.numel() * right.shape[-1]
        return out


def watch(case: Case, passes: str) -> Watch:
    o = case.options
    tables = case.tensors["routing.diag"].shape[1]
    layout = "lag" if case.by_lag else "position"
    options = Options(o["selection"], o["norm"], o["eps"], o["causal"], layout, tables)
    inputs = [case.tensors[name] for name in "qkv"]
    x = OperatorArgs(*inputs, *case.mixes(), Tokens(), options)
    with Watch() as seen:
        outputs = chunked.forward(x)
    if passes == "backward":
        with Watch() as seen:
            backward(torch.ones_like(outputs.o), outputs, x, Needs.of([True] * 11))
    return seen


def long_case(length: int, **chosen: Any) -> Case:
    return make_case(length=length, heads=1, dtype=torch.float32, **chosen)


@pytest.mark.parametrize("passes", ["forward", "backward"])
def test_the_work_is_linear_in_the_length_within_a_window(passes):
    work = [watch(long_case(length, max_lag=64), passes).flops for length in (1024, 2048, 4096)]
    first, second = work[1] - work[0], work[2] - work[1]
    assert second == pytest.approx(2 * first, rel=0.02)


@pytest.mark.parametrize("passes", ["forward", "backward"])
def test_only_the_causal_half_is_computed(passes):
    """The products that are run are those of the formula, and the idle part of the tiles."""
    case = long_case(1024)
    sizes = {"num_heads": 1, "num_maps": 2, "qk": 3, "v": 4, "ranks": (2, 3)}
    formula = {"forward": flops.forward_flops, "backward": flops.backward_flops}[passes]
    expected = formula(flops.visible_pairs(1024), **sizes)
    ratio = watch(case, passes).flops / expected
    assert 1 <= ratio < 1.2
    both_ways = long_case(1024, causal=False)
    assert watch(both_ways, passes).flops > 1.6 * watch(case, passes).flops


@pytest.mark.parametrize("passes", ["forward", "backward"])
@pytest.mark.parametrize("chosen", [{}, {"layout": "position"}, {"causal": False}], ids=str)
def test_nothing_of_size_t_by_t_is_alive(passes, chosen):
    length = 4096
    largest = watch(long_case(length, **chosen), passes).largest
    assert largest < length * length / 16
    assert largest <= 128 * (length + 128 + 16), "a tile has at most 128 rows"


def test_the_watch_sees_a_t_by_t_map():
    with Watch() as seen:
        long_case(512).run("reference")
    assert seen.largest >= 512 * 512
    assert seen.flops > 0


def saved_elements(length: int, backend: str, max_lag: int | None) -> int:
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return x

    case = long_case(length, max_lag=max_lag).map(lambda x: x.requires_grad_())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        case.run(backend)
    return sum(kept.values())


def test_what_is_saved_for_the_backward_is_linear_in_the_length():
    short, long = (saved_elements(n, "chunked", None) for n in (256, 1024))
    assert long <= 4.1 * short
    # the same check sees the reference's maps
    assert saved_elements(1024, "reference", None) > 8 * saved_elements(256, "reference", None)


@pytest.mark.parametrize("max_lag", [None, 8, 100])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 7, 20])
def test_visible_pairs_equal_a_count(length, causal, max_lag):
    if not causal and max_lag is not None:
        pytest.skip("a window is causal")
    i, j = torch.arange(length)[:, None], torch.arange(length)
    seen = torch.ones(length, length, dtype=torch.bool) if not causal else (j <= i) & (i - j < (max_lag or length))
    assert flops.visible_pairs(length, causal=causal, max_lag=max_lag) == int(seen.sum())


def test_the_flop_counter_equals_a_hand_count():
    """T = 3 by lag has 6 pairs; B = 2, H = 2, S = 2, K = 3, V = 4, ranks 2 and 3."""
    case = make_case(length=3, batch=2).map(lambda x: x.requires_grad_())
    with FlopCounterMode(display=False) as forward:
        o = case.run("chunked")
    pair = 2 * (2 * 3 + 2 * 2 + 2 * 2) + 2 * 3 + 2 * 3 + 2 * 4  # two maps: q.k, z1, up; then z2, up, v
    assert forward.get_total_flops() == 2 * 2 * 6 * pair
    with FlopCounterMode(display=False) as back:
        o.sum().backward()
    again = 2 * (2 * 3 + 2 * 2) + 2 * 3  # scores and both maps from the saved statistics
    gradients = 2 * (2 * 2 * 3 + 4 * 2 * 2) + 4 * 2 * 3 + 2 * 2 * 4
    assert back.get_total_flops() == 2 * 2 * 6 * (again + gradients)


def test_the_flop_counter_knows_packing_and_windows():
    def count(case: Case, **kwargs: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            case.run("chunked", **kwargs)
        return counter.get_total_flops()

    whole = count(make_case(length=8))  # 36 pairs
    assert count(make_case(length=8), cu_seqlens=torch.tensor([0, 4, 8])) * 36 == whole * 20
    assert count(make_case(length=8, max_lag=2)) * 36 == whole * 15
    assert count(make_case(length=8, causal=False)) * 36 == whole * 64
