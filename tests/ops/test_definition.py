"""Every path against the definition, token by token, in float64: outputs and all gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import (
    BACKENDS,
    FULL,
    INTERPRETED,
    RTOL,
    assert_close,
    assert_close_to_reference,
    evaluate,
    make_case,
    tiles,
)
from tests.oracle import oracle
from tests.strategies import cases, visibility


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=5 if INTERPRETED else 50)
@given(data=st.data(), case=cases(lengths=(1, 2, 5, 9)), rows=st.sampled_from([3, 32]))
def test_equals_the_definition(backend, data, case, rows):
    seen = data.draw(visibility(case))
    expected = evaluate(case, lambda c: oracle(c, **seen))
    with tiles(rows, elements=32):
        actual = evaluate(case, lambda c: c.run(backend, **seen))
    assert_close(actual.named(), expected.named(), RTOL.get(backend, 1e-9))


@pytest.mark.parametrize("backend", BACKENDS[1:])
@settings(deadline=None, max_examples=2 if INTERPRETED else 150)
@given(data=st.data(), case=cases(max_batch=3), rows=st.sampled_from([7, 16, 32]))
def test_equals_the_reference_at_any_length(backend, data, case, rows):
    seen = data.draw(visibility(case))
    with tiles(rows, elements=1024):
        assert_close(
            evaluate(case, lambda c: c.run(backend, **seen)).named(),
            evaluate(case, lambda c: c.run("reference", **seen)).named(),
            RTOL.get(backend, 1e-9),
        )


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize(("length", "max_lag"), [(257, 257), (300, 100), (130, 600)])
def test_equals_the_reference_over_many_full_size_tiles(backend, length, max_lag):
    case = make_case(length=length, max_lag=max_lag, batch=2)
    assert_close_to_reference(case, lambda c: c.run(backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scales_are_exact(backend):
    """Where PyTorch's softplus is by default the identity, and off by up to 2e-9."""
    case = make_case(length=9, batch=2, selection="glu")
    large = case.with_tensors({"q": 12 * case.tensors["q"]})
    assert_close(evaluate(large, lambda c: c.run(backend)).named(), evaluate(large, oracle).named(), rtol=1e-12)


SWITCHED_OFF = {
    "no routing mixing": {"routing": ("identity",)},
    "no readout mixing": {"readout": ("identity",)},
    "no mixing": {"routing": ("identity",), "readout": ("identity",)},
    "no diagonal": {"routing": ("identity", "low_rank", "core"), "readout": ("identity", "low_rank", "core")},
    "no identity": {"routing": ("diag", "low_rank", "core"), "readout": ("diag", "low_rank", "core")},
    "no low rank": {"routing": ("identity", "diag"), "readout": ("identity", "diag")},
    "diagonal alone": {"routing": ("diag",), "readout": ("diag",)},
    "low rank alone": {"routing": ("low_rank",), "readout": ("low_rank",)},
    "no gate": {"routing": FULL[:3], "readout": FULL[:3]},
    "no norm": {"norm": False},
    "bidirectional": {"causal": False},
    "by position": {"layout": "position"},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("selection", ["glu", "relu"])
@pytest.mark.parametrize("switch", SWITCHED_OFF)
def test_each_switch_alone_equals_the_definition(backend, selection, switch):
    case = make_case(length=7, batch=2, selection=selection, **SWITCHED_OFF[switch])
    with tiles(3):
        found, expected = evaluate(case, lambda c: c.run(backend)).named(), evaluate(case, oracle).named()
    assert_close(found, expected, RTOL.get(backend, 1e-9))


@pytest.mark.parametrize("switch", SWITCHED_OFF)
def test_every_switch_changes_the_output(switch):
    full = make_case(length=7, batch=2)
    switched = make_case(length=7, batch=2, **SWITCHED_OFF[switch])
    switched = switched.with_tensors({n: x for n, x in full.tensors.items() if n in switched.tensors})
    assert not torch.allclose(full.run("reference"), switched.run("reference"), rtol=1e-3)


def test_the_comparison_catches_a_small_error():
    case = make_case()
    with pytest.raises(AssertionError, match="output"):
        assert_close_to_reference(case, lambda c: c.run("chunked") * (1 + 1e-6))
