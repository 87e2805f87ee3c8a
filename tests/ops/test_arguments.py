"""The operator's arguments, flat and by name: programs that were exported hold them by place."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_leaves

from hypermlp.ops import SequenceMix, hyper_attention
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
        named |= dict(zip((f"{name}_{field}" for field in ("diag", "down", "up", "gate")), mix.tensors, strict=True))
    assert tuple(named) == DIFFERENTIABLE
    assert tuple(named.values()) == x.tensors
    grads = Gradients(x.q, x.k, x.v, MixGradients(*x.routing_mix.tensors), MixGradients(*x.readout_mix.tensors))
    assert grads.flat == x.tensors
    for place, name in enumerate(DIFFERENTIABLE):
        needs = Needs.of(place == other for other in range(len(DIFFERENTIABLE)))
        mix, _, field = name.replace("gate", "core").rpartition("_")
        found = getattr(needs, field) if not mix else getattr(getattr(needs, mix), field)
        assert found
        assert sum((needs.q, needs.k, needs.v, *needs.routing, *needs.readout)) == 1
    assert Needs.of([True] * 11) == Needs(True, True, True, MixNeeds(*[True] * 4), MixNeeds(*[True] * 4))


def test_the_core_of_a_mixing_answers_to_its_old_name():
    core = torch.zeros(1, 2, 3, 4)
    with pytest.deprecated_call(match="write core"):
        mix = SequenceMix(None, gate=core, identity=False)
    assert mix == SequenceMix(core=core, identity=False)
    with pytest.deprecated_call(match="write core"):
        assert mix.gate is core
    with pytest.deprecated_call(), pytest.raises(TypeError, match="one core"):
        SequenceMix(core=core, gate=core)
    assert tree_leaves(mix) == [None, None, None, core, False], "a named tuple like any other"


def test_a_mixing_is_made_in_a_compiled_graph():
    x, core = torch.randn(1, 3, 1, 2), torch.rand(1, 3, 1, 2)
    tables = torch.randn(1, 4), torch.randn(1, 4, 2), torch.randn(1, 4, 2)

    def run(core: torch.Tensor) -> torch.Tensor:
        return hyper_attention(x, x, x, SequenceMix(*tables, core=core), selection="relu", backend="chunked")

    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="eager")(core), run(core))

    def run_by_old_name(core: torch.Tensor) -> torch.Tensor:
        return SequenceMix(gate=core).gate + 1

    assert torch.equal(torch.compile(run_by_old_name, fullgraph=True, backend="eager")(core), core + 1)
