"""Maps by lag against the definition, token by token."""

from __future__ import annotations

import pytest
import torch

from hypermlp import inspect
from hypermlp.layers.maps import attention_map
from tests.helpers import error
from tests.inspect.cases import LAYERS, SOFTMAX, TOKENS, by_key, call, case_of, columns, make, spread


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("kind", LAYERS)
def test_maps_are_those_of_the_definition(kind: str, tokens: str) -> None:
    made = call(make(**LAYERS[kind]), tokens)
    maps, case = inspect.head_maps(made), case_of(made)
    cells = columns(made, case)
    visible = torch.zeros_like(maps.visible)
    for b, i, key, column in cells:
        visible[b, 0, i, column] = True
        assert maps.distance[b, 0, i, column] == abs(i - key)
    assert torch.equal(maps.visible, visible)
    assert torch.equal(maps.valid, visible.any(-1)[:, 0])

    weights = by_key(made, case)
    assert error(spread(maps, cells, maps.weights), weights) < 1e-11
    by_path = attention_map(made.layer, *made[2:4], cu_seqlens=made.cu_seqlens)
    assert error(weights, by_path * maps.valid[:, None, :, None]) < 1e-11
    no_readout = {name: y for name, y in case.tensors.items() if not name.startswith("readout.")}
    active = by_key(made, case._replace(tensors=no_readout).with_options(readout_identity=True))
    assert maps.active is not None
    assert error(spread(maps, cells, maps.active), active) < 1e-11
    for of in (maps.weights, maps.active):
        assert not of[~visible.expand_as(of)].any()

    _check_z(maps.z1, case, cells, "routing", None)
    _check_z(maps.z2, case, cells, "readout", active)


def _check_z(z, case, cells, name, of):
    """``z`` is the sum of the scores, or of ``of`` ``[B, H, T, T]``, times the table."""
    down = case.tensors.get(f"{name}.down")
    if down is None:
        assert z is None
        return
    expected = torch.zeros(*case.tensors["q"].shape[:2], *down[:, 0].shape, dtype=torch.float64)
    for b, i, key, column in cells:
        x = of[b, :, i, key] if of is not None else (case.tensors["q"][b, i] * case.tensors["k"][b, key]).sum(-1)
        expected[b, i] += x[:, None] * down[:, column]
    assert error(z, expected) < 1e-11


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("kind", SOFTMAX)
def test_softmax_has_weights_alone(kind: str, tokens: str) -> None:
    made = call(make(**SOFTMAX[kind]), tokens)
    maps, case = inspect.head_maps(made), case_of(made)
    if not made.layer.config.causal:
        case = case.with_options(max_lag=None)
    q, k = case.tensors["q"], case.tensors["k"]
    cells = columns(made, case)
    scores = torch.full((*q.shape[:1], q.shape[2], q.shape[1], q.shape[1]), -torch.inf, dtype=torch.float64)
    for b, i, key, _ in cells:
        scores[b, :, i, key] = (q[b, i] * k[b, key]).sum(-1) / q.shape[-1] ** 0.5
    assert error(spread(maps, cells, maps.weights), scores.softmax(-1).nan_to_num(0)) < 1e-11
    assert maps.visible.sum() == len(cells)
    assert not maps.weights[~maps.visible.expand_as(maps.weights)].any()
    assert maps[1] is None
    assert maps[4:] == (None,) * 4


def test_absent_mixings_are_none() -> None:
    one = inspect.head_maps(call(make(**LAYERS["mlp, one mixing"])))
    assert one.routing_mix is None
    assert one.readout_mix is not None
    assert inspect.head_maps(call(make(**LAYERS["relu"]))).readout_mix is None


def test_weights_do_not_depend_on_the_path() -> None:
    made = call(make(**LAYERS["glu, window"]), "padded")
    expected = inspect.head_maps(made)
    made.layer.backend = "chunked"
    assert torch.equal(inspect.head_maps(made).weights, expected.weights)


def test_half_precision_is_read_in_float32() -> None:
    layer = make(**LAYERS["glu, window"], dtype=torch.bfloat16)
    made = call(layer)._replace(hidden_states=call(layer).hidden_states.bfloat16())
    maps = inspect.head_maps(made)
    assert {y.dtype for y in (maps.weights, maps.active, maps.z1, maps.z2)} == {torch.float32}
    assert {y.diag.dtype for y in inspect.mix_responses(maps)} == {torch.float32}


def test_no_gradients_are_kept() -> None:
    maps = inspect.head_maps(call(make(**LAYERS["glu, window"])))
    assert not any(y.requires_grad for y in maps[:6] if y is not None)


def test_a_text_that_no_memory_holds_is_refused() -> None:
    made = call(make("relu"))
    with pytest.raises(ValueError, match=r"1 x 100000 tokens would take 596 GiB a layer: give a shorter text"):
        inspect.head_maps(made._replace(hidden_states=torch.empty(1, 100_000, 12)))


def test_no_tokens_have_no_maps() -> None:
    made = call(make("relu"))
    with pytest.raises(ValueError, match="have no tokens"):
        inspect.head_maps(made._replace(hidden_states=made.hidden_states[:, :0]))
