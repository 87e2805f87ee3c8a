"""A block of new tokens against earlier ones: the operator and the reference agree, in values and in gradients."""

from __future__ import annotations

import pytest
import torch

from hypermlp.ops.arguments import Options
from hypermlp.ops.decode import Past, StepArgs, decode_block
from tests.helpers import STREAMS, assert_close, make_case

QUERIES = ("q", "routing.core", "readout.core")
NEW, LENGTH = 4, 9


@pytest.mark.parametrize("layout", ["lag", "position"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_block_is_the_last_rows_of_the_whole(layout, masked):
    case = make_case(batch=2, length=LENGTH, layout=layout, max_lag=LENGTH).map(lambda x: x.requires_grad_())
    mask = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(3)) < 0.7 if masked else None
    if mask is not None:
        zeroed = {n: (x * mask[:, :, None, None]).detach() for n, x in case.tensors.items() if n in STREAMS}
        case = case.with_tensors(zeroed).map(lambda x: x.requires_grad_())
    whole = case.run("reference", attention_mask=mask)[:, -NEW:]

    block = case.with_tensors({name: case.tensors[name][:, -NEW:] for name in QUERIES})
    k, v = case.tensors["k"], case.tensors["v"]
    past = Past([k.permute(0, 2, 3, 1).flatten(0, 1)], [v.transpose(1, 2).flatten(0, 1)], mask)
    options = Options("glu", True, 1e-12, True, layout, LENGTH)

    def run():
        out = decode_block(StepArgs(block.tensors["q"], past, *block.mixes(), options))
        return out if mask is None else out * mask[:, -NEW:, None, None]

    with torch.no_grad():
        assert_close({"operator": run()}, {"operator": whole})
    recorded, weight = run(), torch.randn_like(whole)
    assert_close({"reference": recorded}, {"reference": whole})
    inputs = list(case.tensors.values())
    found, expected = (torch.autograd.grad(out, inputs, weight, retain_graph=True) for out in (recorded, whole))
    assert_close(dict(zip(case.tensors, found, strict=True)), dict(zip(case.tensors, expected, strict=True)))
