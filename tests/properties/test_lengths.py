"""Properties 2 and 3: a shorter run is a prefix of a longer one, and unused lags change nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hypermlp.ops import SequenceMix, hyper_attention
from tests.helpers import BACKENDS, STREAMS, assert_close, evaluate, make_case, tiles
from tests.strategies import cases

TABLES = ("routing.diag", "routing.down", "routing.up", "readout.diag", "readout.down", "readout.up")


def prefix(case, length):
    return case.map(lambda x: x).with_tensors({n: x[:, :length] for n, x in case.tensors.items() if n in STREAMS})


def assert_length_consistent(case, backend, length, op=hyper_attention):
    """Outputs and table gradients of the first ``length`` tokens do not know that more follow."""
    weight = torch.randn(case.tensors["v"].shape, dtype=torch.float64)
    weight[:, length:] = 0
    long = evaluate(case, lambda c: c.run(backend, op), weight)
    short = evaluate(prefix(case, length), lambda c: c.run(backend, op), weight[:, :length])
    assert_close({"output": long.output[:, :length]}, {"output": short.output})
    assert_close({n: g[:, :length] for n, g in long.streams.items()}, short.streams)
    assert_close(long.shared, short.shared)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=40)
@given(data=st.data(), case=cases(lengths=(2, 3, 16, 17, 65), causal=True), rows=st.sampled_from([5, 32]))
def test_a_prefix_is_a_run_of_its_own(backend, data, case, rows):
    with tiles(rows):
        assert_length_consistent(case, backend, data.draw(st.integers(1, case.tensors["q"].shape[1] - 1)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_tables_that_move_with_the_length_are_caught(backend):
    def right_aligned(q, k, v, *mixes, **options):
        def moved(table):
            return None if table is None else table.roll(-q.shape[1], dims=1)

        mixes = [m._replace(diag=moved(m.diag), down=moved(m.down), up=moved(m.up)) for m in mixes]
        return hyper_attention(q, k, v, *mixes, **options)

    with pytest.raises(AssertionError):
        assert_length_consistent(make_case(), backend, 4, right_aligned)


def explicit_window(case):
    """Each row as a sequence of its own of the last ``max_lag`` tokens, which never outgrows its tables."""
    length, max_lag = case.tensors["q"].shape[1], case.options["max_lag"]
    rows = []
    for i in range(length):
        start = max(0, i - max_lag + 1)
        part = case.with_tensors({n: x[:, start : i + 1] for n, x in case.tensors.items() if n in STREAMS})
        rows.append(part.run("reference")[:, -1])
    return torch.stack(rows, 1)


def assert_window(case, backend, op=hyper_attention):
    windowed = evaluate(case, lambda c: c.run(backend, op))
    assert_close(windowed.named(), evaluate(case, explicit_window).named())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("max_lag", [1, 2, 5, 16, 17])
@pytest.mark.parametrize("routing", [("identity", "diag", "low_rank", "core"), ("low_rank",), ("identity",)])
def test_a_sequence_longer_than_max_lag_is_a_window(backend, max_lag, routing):
    with tiles(7):
        assert_window(make_case(length=19, batch=2, max_lag=max_lag, routing=routing), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_one_token_too_long_is_caught(backend):
    def longer(q, k, v, *mixes, **options):
        def grown(table):
            return None if table is None else torch.cat((table, table[:, :1] * 0), 1)

        mixes = [m._replace(diag=grown(m.diag), down=grown(m.down), up=grown(m.up)) for m in mixes]
        return hyper_attention(q, k, v, *mixes, **(options | {"max_lag": options["max_lag"] + 1}))

    with pytest.raises(AssertionError):
        assert_window(make_case(length=12, max_lag=5), backend, longer)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["lag", "position"])
def test_rows_of_tables_beyond_the_sequence_change_nothing(backend, layout):
    """Whatever they hold; and their gradient is zero."""
    case = make_case(length=9, max_lag=9, layout=layout)
    longer = {
        n: torch.cat((x, torch.full_like(x[:, :4], float("nan"))), 1) for n, x in case.tensors.items() if n in TABLES
    }
    grown = case.with_tensors(longer).with_options(max_lag=13)
    found, expected = evaluate(grown, lambda c: c.run(backend)), evaluate(case, lambda c: c.run(backend))
    assert_close({"output": found.output} | found.streams, {"output": expected.output} | expected.streams)
    assert_close({n: g[:, :9] for n, g in found.shared.items()}, expected.shared)
    assert not any(g[:, 9:].any() for g in found.shared.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_without_tables_is_max_lag(backend):
    case = make_case(length=12, max_lag=4, routing=("identity",), readout=("identity",))
    assert_window(case, backend)
    q, k, v = (case.tensors[n] for n in "qkv")
    assert not torch.allclose(case.run(backend), hyper_attention(q, k, v, SequenceMix(), backend=backend))
