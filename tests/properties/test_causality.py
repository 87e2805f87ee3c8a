"""Property 1: what comes later changes nothing before, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hypermlp.ops import hyper_attention
from tests.helpers import BACKENDS, STREAMS, make_case, tiles
from tests.strategies import cases


def assert_causal(case, backend, first_changed, junk, op=hyper_attention):
    """Streams from ``first_changed`` on replaced: exactly equal before, and not after."""
    changed = {name: x.clone() for name, x in case.tensors.items() if name in STREAMS}
    for x in changed.values():
        x[:, first_changed:] = torch.randn_like(x[:, first_changed:]) if junk == "random" else float(junk)
    before, after = case.run(backend, op), case.with_tensors(changed).run(backend, op)
    earlier = (before[:, :first_changed], after[:, :first_changed])
    assert torch.equal(*earlier)
    assert not torch.equal(before[:, first_changed:], after[:, first_changed:])


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=40)
@given(
    data=st.data(),
    case=cases(lengths=(2, 3, 15, 17, 65), causal=True, norm=False),
    junk=st.sampled_from(["random", "1e4", "nan", "inf"]),
    rows=st.sampled_from([5, 32]),
)
def test_later_tokens_change_nothing_before(backend, data, case, junk, rows):
    first_changed = data.draw(st.integers(1, case.tensors["q"].shape[1] - 1))
    with tiles(rows):
        # a selection that lets nothing through is blind to what comes later
        case = case.map(torch.abs)
        assert_causal(case, backend, first_changed, junk)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_later_tokens_change_nothing_before_in_low_precision(dtype):
    assert_causal(make_case(length=40, dtype=dtype), "reference", 17, "random")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("leak", ["value", "key"])
def test_a_leak_of_one_token_is_caught(backend, leak):
    def leaky(q, k, v, *mixes, **options):
        if leak == "value":
            v = v + 1e-9 * v.roll(-1, dims=1)
        else:
            k = k + 1e-9 * k.mean(1, keepdim=True)
        return hyper_attention(q, k, v, *mixes, **options)

    with pytest.raises(AssertionError):
        assert_causal(make_case(), backend, 5, "random", leaky)
