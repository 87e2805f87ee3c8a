"""The operator's arguments, flat and by name: programs that were exported hold them by place."""

from __future__ import annotations

import pytest
import torch

from hypermlp.ops import SequenceMix
from hypermlp.ops.arguments import DIFFERENTIABLE, Gradients, MixGradients, MixNeeds, Needs, OperatorArgs, Options
from hypermlp.ops.library import PATHS
from hypermlp.ops.varlen import Tokens

TENSORS = "Tensor q, Tensor k, Tensor v"
TABLES = ", ".join(f"Tensor? {m}_{x}" for m in ("routing", "readout") for x in ("diag", "down", "up", "gate"))
SWITCHES = "str selection, bool norm, float eps"
INPUTS = (
    f"{TENSORS}, {TABLES}, Tensor? attention_mask, Tensor? cu_seqlens, bool routing_identity, bool readout_identity, "
    f"{SWITCHES}, bool causal, str layout, SymInt? max_lag"
)


@pytest.mark.parametrize("path", ["chunked", "native", "triton"])
def test_schemas_are_those_of_programs_that_were_exported(path):
    assert path in PATHS
    forward = getattr(torch.ops.hypermlp, f"{path}_forward").default._schema
    backward = getattr(torch.ops.hypermlp, f"{path}_backward").default._schema
    assert str(forward) == f"hypermlp::{path}_forward({INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)"
    outputs = "Tensor grad_o, Tensor o, Tensor z1, Tensor rho, Tensor z2, bool[] needs"
    assert str(backward) == f"hypermlp::{path}_backward({outputs}, {INPUTS}) -> Tensor[]"


def test_the_schema_of_a_step():
    places = "Tensor? valid, Tensor? start, Tensor? length"
    inputs = (
        f"Tensor q, Tensor[] keys, Tensor[] values, {places}, {TABLES}, bool routing_identity, bool readout_identity, "
        f"{SWITCHES}, SymInt? max_lag"
    )
    assert str(torch.ops.hypermlp.triton_decode.default._schema) == f"hypermlp::triton_decode({inputs}) -> Tensor"


def numbered() -> OperatorArgs:
    """Every tensor another number."""
    q, k, v, *tables, mask, bounds = (torch.tensor(n) for n in range(13))
    mixes = SequenceMix(*tables[:4], identity=False), SequenceMix(*tables[4:])
    return OperatorArgs(q, k, v, *mixes, Tokens(mask, bounds), Options("relu", False, 0.5, True, "lag", 7))


def test_arguments_come_back_as_they_were():
    x = numbered()
    flat = x.flatten()
    assert [int(y) for y in flat[:13]] == list(range(13))
    assert flat[13:] == (False, True, "relu", False, 0.5, True, "lag", 7)
    assert OperatorArgs.unflatten(flat) == x


def test_gradients_and_needs_stand_in_the_order_of_the_tensors():
    x = numbered()
    named = {"q": x.q, "k": x.k, "v": x.v}
    for name, mix in (("routing", x.routing_mix), ("readout", x.readout_mix)):
        named |= {f"{name}_{field}": getattr(mix, field) for field in ("diag", "down", "up", "gate")}
    assert tuple(named) == DIFFERENTIABLE
    assert tuple(named.values()) == x.tensors
    grads = Gradients(x.q, x.k, x.v, MixGradients(*x.routing_mix.tensors), MixGradients(*x.readout_mix.tensors))
    assert grads.flat == x.tensors
    for place, name in enumerate(DIFFERENTIABLE):
        needs = Needs.of(place == other for other in range(len(DIFFERENTIABLE)))
        mix, _, field = name.rpartition("_")
        found = getattr(needs, field) if not mix else getattr(getattr(needs, mix), field)
        assert found
        assert sum((needs.q, needs.k, needs.v, *needs.routing, *needs.readout)) == 1
    assert Needs.of([True] * 11) == Needs(True, True, True, MixNeeds(*[True] * 4), MixNeeds(*[True] * 4))
