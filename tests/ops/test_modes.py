"""When values may be read, and what a check does where they may not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from hypermlp.ops.modes import needs_plain_operators, require, values_readable
from tests.helpers import make_case

X = torch.ones(3)


class Plain(Tensor):
    """A subclass that changes nothing."""


def test_what_is_there_is_read():
    assert values_readable()
    assert values_readable(X, torch.nn.Parameter(X), X.as_subclass(Plain))
    with torch.inference_mode(), FlopCounterMode(display=False):
        assert values_readable(X, X + 1)
    assert not needs_plain_operators()


def _recorded(run) -> list[bool]:
    """What was found while a call was recorded."""
    found: list[bool] = []

    def call(x: Tensor) -> Tensor:
        found.append(values_readable(x, wait=True))
        return x + 1

    run(call)
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "run",
    {
        "meta": lambda call: call(X.to("meta")),
        "fake": lambda call: call(FakeTensorMode().from_tensor(X)),
        "make_fx": lambda call: make_fx(call)(X),
        "trace": lambda call: torch.jit.trace(call, (X,), check_trace=False),
        "vmap": lambda call: torch.func.vmap(call)(X),
        "grad": lambda call: torch.func.grad(lambda x: call(x).sum())(X),
        "functionalize": lambda call: torch.func.functionalize(call)(X),
    }.items(),
    ids=lambda item: item[0],
)
def test_what_is_recorded_or_not_there_is_not_read(run):
    found = _recorded(run[1])
    assert found
    assert not any(found)


def test_a_compiled_call_reads_nothing():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + values_readable(x), backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), X)
    exported = torch.export.export(_Asks(), (X,))
    assert torch.equal(exported.module()(X), X)


class _Asks(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + values_readable(x)


def checked(x: Tensor) -> Tensor:
    require((x > 0).all(), "x must be positive")
    return x * 2


class _Checked(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return checked(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_check_that_cannot_be_made_at_once_is_made_later():
    torch._dynamo.reset()
    with pytest.raises(ValueError, match="x must be positive"):
        checked(-X)
    with pytest.raises(ValueError, match="x must be positive"):
        torch.func.vmap(checked)(torch.stack((X, -X)))
    with pytest.raises(ValueError, match="x must be positive"):
        torch.func.grad(lambda x: checked(x).sum())(-X)
    with pytest.raises(ValueError, match="x must be positive"):
        torch.jit.trace(checked, (-X,))
    later = [
        torch.compile(checked, backend="aot_eager", fullgraph=True),
        torch.export.export(_Checked(), (X,)).module(),
        make_fx(checked)(X),
    ]
    for call in (checked, torch.func.functionalize(checked), torch.jit.trace(checked, (X,)), *later):
        assert torch.equal(call(X), 2 * X)
    assert torch.equal(torch.func.vmap(checked)(torch.stack((X, X + 1))), torch.stack((2 * X, 2 * X + 2)))
    assert checked(X.to("meta")).is_meta
    for call in later:
        with pytest.raises(RuntimeError, match="x must be positive"):
            call(-X)


def test_flops_of_bounds_that_cannot_be_read_are_those_of_one_sequence():
    case, bounds = make_case(length=6), torch.tensor([0, 2, 6])
    counts = []
    for fake, seen in ((False, bounds), (False, None), (True, bounds)):
        with FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.no_grad() as mode:
            tensors = case.map(mode.from_tensor) if fake else case
            seen = mode.from_tensor(seen) if fake else seen
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                tensors.run("chunked", cu_seqlens=seen)
        counts.append(counter.get_total_flops())
    packed, whole, unread = counts
    assert packed < whole == unread
