"""Property 5: padded tokens and packed neighbours are as if they did not exist."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hypermlp.ops import hyper_attention
from tests.arrangements import Arrangement, assert_same_as_alone, operator_evaluate, sequences_of
from tests.helpers import BACKENDS, assert_close, evaluate, make_case, tiles
from tests.oracle import oracle
from tests.strategies import LENGTHS, switches

JUNK = [1, float("nan"), float("inf"), -float("inf"), 1e30]


@st.composite
def arrangements(draw: st.DrawFn) -> Arrangement:
    lengths = draw(st.lists(st.sampled_from(LENGTHS[:-1]), min_size=1, max_size=4))
    if draw(st.booleans()):
        room = [draw(st.integers(0, 3)) for _ in lengths] if draw(st.booleans()) else None
        return Arrangement.packed(lengths, room)
    total = max(lengths) + draw(st.integers(0, 4))
    return Arrangement.padded(lengths, [draw(st.integers(0, total - n)) for n in lengths], total)


def assert_invisible(backend, arrangement, junk, op=hyper_attention, **chosen):
    longest = max(arrangement.lengths)
    # by position the whole row must fit the tables, padding included
    by_lag = chosen.get("layout") == "lag" or (chosen.get("layout") is None and chosen.get("causal", True))
    max_lag = max(2, longest // 2) if by_lag else arrangement.length
    case = make_case(batch=len(arrangement.lengths), length=longest, max_lag=max_lag, **chosen)
    sequences = sequences_of(case, arrangement.lengths)
    assert_same_as_alone(operator_evaluate(case, backend, op), sequences, arrangement, junk)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=60)
@given(chosen=switches(), arrangement=arrangements(), junk=st.sampled_from(JUNK), rows=st.sampled_from([5, 32]))
def test_padded_and_packed_sequences_are_as_if_alone(backend, chosen, arrangement, junk, rows):
    with tiles(rows, elements=512):
        assert_invisible(backend, arrangement, junk, **chosen)


ARRANGEMENTS = {
    "left": Arrangement.padded([6, 9, 1], [3, 0, 8], 9),
    "right": Arrangement.padded([6, 9, 1], [0, 0, 0], 9),
    "both": Arrangement.padded([6, 7, 1], [1, 2, 4], 10),
    "packed": Arrangement.packed([6, 9, 1]),
    "packed with room": Arrangement.packed([6, 9, 1], [2, 0, 3]),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_ignoring_the_mask_or_the_bounds_is_caught(backend, name):
    def blind(*args, attention_mask, cu_seqlens, **options):
        o = hyper_attention(*args, **options)
        return o if attention_mask is None else o * attention_mask[..., None, None]

    with pytest.raises(AssertionError):
        assert_invisible(backend, ARRANGEMENTS[name], float("nan"), blind)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padded_values_alone_hidden_is_caught(backend):
    """As in the authors' code: padded keys still enter z1, rho and z2."""

    def values_hidden(q, k, v, *mixes, attention_mask, cu_seqlens, **options):
        if attention_mask is not None:
            v = v * attention_mask[..., None, None]
        o = hyper_attention(q, k, v, *mixes, **options)
        return o if attention_mask is None else o * attention_mask[..., None, None]

    with pytest.raises(AssertionError):
        assert_invisible(backend, ARRANGEMENTS["left"], 1, values_hidden)


HOLES = torch.tensor([[1, 0, 1, 1, 0, 0, 1], [0, 1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("chosen", [{}, {"layout": "position"}, {"causal": False}, {"selection": "relu"}], ids=str)
def test_a_masked_token_inside_keeps_its_place_and_gives_nothing(backend, junk, chosen):
    case = make_case(batch=4, length=7, **chosen)
    expected = evaluate(case, lambda c: oracle(c, HOLES))
    hidden = case.with_tensors(
        {
            name: torch.where((HOLES == 0).reshape(4, 7, 1, 1), float(junk), x)
            for name, x in case.tensors.items()
            if x.ndim == 4
        }
    )
    with tiles(3):
        found = evaluate(hidden, lambda c: c.run(backend, attention_mask=HOLES))
    assert_close(found.named(), expected.named())
    assert not any(x[HOLES == 0].any() for x in [found.output, *found.streams.values()])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64])
def test_masks_of_every_integer_type_mean_the_same(backend, dtype):
    case = make_case(batch=4, length=7)
    expected = case.run(backend, attention_mask=HOLES)
    assert torch.equal(case.run(backend, attention_mask=HOLES.to(dtype)), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("norm", [True, False])
def test_a_batch_with_no_valid_token_is_zero_with_zero_gradients(backend, dtype, norm):
    case = make_case(batch=2, length=5, dtype=dtype, norm=norm)
    found = evaluate(case, lambda c: c.run(backend, attention_mask=torch.zeros(2, 5, dtype=torch.bool)))
    assert not any(x.any() for x in found.named().values())
