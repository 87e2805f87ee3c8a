"""The native path's pieces: the same bits for any number of threads, and for a row alone or among others."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from hypermlp_kernels.native import launch, threads
from tests.helpers import Case, assert_close, evaluate, make_case

pytestmark = pytest.mark.usefixtures("native_path")


def run(case: Case, count: int, **seen: torch.Tensor) -> dict[str, torch.Tensor]:
    torch.set_num_threads(count)
    return evaluate(case, lambda c: c.run("native", **seen)).named()


CASES = {
    "one long sequence": ({"length": 700, "qk": 16, "v": 20, "ranks": (16, 5)}, None),
    "window": ({"length": 700, "max_lag": 100}, None),
    "bidirectional": ({"length": 500, "causal": False}, None),
    "by position": ({"length": 500, "layout": "position"}, None),
    "many sequences": ({"batch": 40, "length": 30}, None),
    "packed": ({"length": 600}, [0, 5, 300, 300, 310, 580]),
    "one map": ({"length": 500, "selection": "relu", "heads": 3}, None),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_bits_for_any_number_of_threads(name):
    chosen, bounds = CASES[name]
    case = make_case(dtype=torch.float32, **chosen)
    seen = {} if bounds is None else {"cu_seqlens": torch.tensor(bounds)}
    expected = run(case, 1, **seen)
    for count in (2, 3, 8):
        found = run(case, count, **seen)
        assert all(torch.equal(found[n], expected[n]) for n in expected), count


@pytest.mark.parametrize("name", CASES)
def test_pieces_of_a_sequence_add_up(name):
    chosen, bounds = CASES[name]
    case = make_case(**chosen)
    seen = {} if bounds is None else {"cu_seqlens": torch.tensor(bounds)}
    assert_close(run(case, 3, **seen), evaluate(case, lambda c: c.run("chunked", **seen)).named())


@pytest.mark.parametrize("stop", [1, 24, 25, 300, 513])
@pytest.mark.parametrize("chosen", [{}, {"max_lag": 290}, {"layout": "position"}], ids=str)
def test_a_shorter_run_has_the_same_bits(stop, chosen):
    """How sums are cut depends on lag and key, and not on the tile that a row is in."""
    case = make_case(length=514, dtype=torch.float32, **chosen)
    streams = {n: x[:, :stop] for n, x in case.tensors.items() if x.ndim == 4}
    assert torch.equal(case.with_tensors(streams).run("native"), case.run("native")[:, :stop])


def test_packed_sequences_have_the_bits_that_each_has_alone():
    case = make_case(length=400, max_lag=400, dtype=torch.float32)
    bounds = [0, 7, 300, 400]
    together = case.run("native", cu_seqlens=torch.tensor(bounds))
    for start, stop in pairwise(bounds):
        alone = case.with_tensors({n: x[:, start:stop] for n, x in case.tensors.items() if x.ndim == 4})
        assert torch.equal(together[:, start:stop], alone.run("native"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("at", [30, 47, 48])
def test_a_later_token_changes_no_bit_of_what_does_not_see_it(value, at):
    case = make_case(length=60, batch=2, dtype=torch.float32)
    streams = {n: x.clone() for n, x in case.tensors.items() if x.ndim == 4}
    for x in streams.values():
        x[0, at:] = value
    weight = torch.randn(case.tensors["v"].shape)
    weight[0, at:] = 0
    clean = evaluate(case, lambda c: c.run("native"), weight)
    marked = evaluate(case.with_tensors(streams), lambda c: c.run("native"), weight)
    assert torch.equal(clean.output[0, :at], marked.output[0, :at])
    assert torch.equal(clean.output[1], marked.output[1])
    for name in ("q", "routing.core", "readout.core"):
        assert torch.equal(clean.streams[name][0, :at], marked.streams[name][0, :at]), name
    for name, x in clean.streams.items():
        assert torch.equal(x[1], marked.streams[name][1]), name


@pytest.mark.parametrize("name", CASES)
def test_whose_threads_they_are_changes_no_bit(name, monkeypatch):
    chosen, bounds = CASES[name]
    case = make_case(dtype=torch.float32, **chosen)
    seen = {} if bounds is None else {"cu_seqlens": torch.tensor(bounds)}
    expected = run(case, 3, **seen)
    monkeypatch.setattr(launch, "torchs_parallel", lambda: None)
    found = run(case, 3, **seen)
    assert all(torch.equal(found[n], expected[n]) for n in expected)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PyTorch's threads are taken on Linux alone")
def test_pytorchs_threads_are_taken_where_it_has_openmp():
    assert (threads.torchs_parallel() is not None) == torch.backends.openmp.is_available()


def test_tiny_numbers_are_zero_for_all_threads_or_for_none():
    """What PyTorch's threads were made with is not what a later caller has."""
    case = make_case(length=300, heads=4, dtype=torch.float32)
    run(case, 2)  # makes them
    tiny = case.with_tensors({"v": 1e-38 * case.tensors["v"]})
    for flush in (True, False):
        assert torch.set_flush_denormal(flush)
        try:
            # as bits: a comparison of numbers flushes, too
            torch.set_num_threads(1)
            expected = tiny.run("native").view(torch.int32)
            torch.set_num_threads(2)
            found = [tiny.run("native").view(torch.int32) for _ in range(5)]
        finally:
            torch.set_flush_denormal(False)
        assert all(torch.equal(x, expected) for x in found)


def test_who_cannot_say_whether_it_was_forked_uses_threads_of_its_own(monkeypatch):
    stat = Path("/proc/self/stat").read_text() if sys.platform.startswith("linux") else ""
    for flags in ("0", "4194368", None):
        head, _, rest = stat.rpartition(")")
        fields = rest.split()
        fields[6:7] = [flags] if flags else []
        said = f"{head}) {' '.join(fields)}" if flags else "nothing of the kind"
        monkeypatch.setattr(Path, "read_text", lambda self, said=said: said)
        threads._address.cache_clear()
        assert threads.torchs_parallel() is None
    threads._address.cache_clear()


_FORKS = """
import os, torch
from tests.helpers import make_case
case = make_case(length=300, dtype=torch.float32)
torch.set_num_threads(2)
{before}
child = os.fork()
if child == 0:
    found = case.run("native")
    torch.set_num_threads(1)
    os._exit(0 if torch.equal(found, case.run("native")) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize(
    "before",
    ['case.run("native")', pytest.param("torch.ones(400, 400) @ torch.ones(400, 400)", marks=pytest.mark.slow)],
)
def test_a_forked_child_uses_threads_of_its_own(before):
    """As workers of a DataLoader are made: PyTorch's threads do not survive a fork, whoever began them. In a process of
    its own."""
    code = _FORKS.replace("{before}", before)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=Path(__file__).parents[3])


def test_a_non_finite_gradient_reaches_what_it_should_and_no_more():
    """Row 30's gradient is NaN in one channel: values that row 30 sees are marked there, the rest is as it was."""
    case = make_case(length=60, dtype=torch.float32).map(lambda x: x.requires_grad_())
    o = case.run("native")
    weight = torch.randn_like(o)
    marked = weight.clone()
    marked[0, 30, 0, 1] = float("nan")
    tensors = [case.tensors[n] for n in "qkv"]
    clean = torch.autograd.grad(o, tensors, weight, retain_graph=True)
    found = torch.autograd.grad(o, tensors, marked)
    dv = found[2][0, :, 0]
    assert dv[:31, 1].isnan().all()
    assert torch.equal(dv[31:], clean[2][0, 31:, 0])
    assert torch.equal(dv[:, 0], clean[2][0, :, 0, 0])
    dq = found[0][0, :, ::2]  # both maps of head 0
    assert dq[30].isnan().all()
    assert torch.equal(torch.cat((dq[:30], dq[31:])), torch.cat((clean[0][0, :30, ::2], clean[0][0, 31:, ::2])))
    dk = found[1][0, 31:, ::2]
    assert torch.equal(dk, clean[1][0, 31:, ::2])
