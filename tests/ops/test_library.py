"""The chunked and the native path as operators of PyTorch: opcheck, compile, export, shapes without memory."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from hypermlp.ops import SequenceMix
from tests.helpers import BACKENDS, Case, assert_close, evaluate, make_case
from tests.quick import combinations

CASES: dict[str, dict[str, Any]] = {
    "glu": {},
    "relu without low rank": {"selection": "relu", "routing": ("identity", "diag"), "readout": ("identity",)},
    "bidirectional": {"causal": False},
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.fixture(autouse=True)
def _forget_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def forward_args(case: Case, mask=None, bounds=None) -> tuple[Any, ...]:
    q, k, v = (case.tensors[n] for n in "qkv")
    (*routing, identity1), (*readout, identity2) = case.mixes()
    o = case.options
    layout, rows = "lag" if case.by_lag else "position", case.tensors["q"].shape[1]
    options = (identity1, identity2, o["selection"], o["norm"], o["eps"], o["causal"], layout, rows)
    return (q, k, v, *routing, *readout, mask, bounds, *options)


SEEN = {
    "plain": (None, None),
    "mask": (torch.tensor([[True, False, True, True, False]]), None),
    "packed": (None, torch.tensor([0, 2, 5])),
}


# the first case for all paths, the others for one path or the other by what is seen
FORWARD = combinations(
    BACKENDS[1:], CASES, SEEN, quick=lambda path, name, seen: name == "glu" or (path == "native") == (seen == "mask")
)


@pytest.mark.parametrize(("path", "name", "seen"), FORWARD)
def test_opcheck_of_the_forward(path, name, seen):
    case = make_case(length=5, **CASES[name]).map(lambda x: x.requires_grad_())
    torch.library.opcheck(operator(f"{path}_forward").default, forward_args(case, *SEEN[seen]))


def operator(name: str) -> Any:
    return getattr(torch.ops.hypermlp, name)


def transposed(x: torch.Tensor) -> torch.Tensor:
    """The same values in another memory order."""
    return x.mT.contiguous().mT


# every case with all gradients and with some, each in one memory order and by one path; the first in all
QUICK = ({"chunked", "all", "contiguous"}, {"native", "some", "transposed"})
BACKWARD = combinations(
    BACKENDS[1:], CASES, ["all", "some"], ["contiguous", "transposed"],
    quick=lambda path, name, asked, order: name == "glu" or {path, asked, order} in QUICK,
)  # fmt: skip


@pytest.mark.parametrize(("path", "name", "asked", "order"), BACKWARD)
def test_opcheck_of_the_backward(path, name, asked, order):
    case = make_case(length=5, **CASES[name]).map(transposed if order == "transposed" else lambda x: x)
    args = forward_args(case)
    needs = [True] * 11 if asked == "all" else [True, False, True] + [False, True] * 4
    needs = [need and x is not None for need, x in zip(needs, args[:11], strict=True)]
    output = operator(f"{path}_forward")(*args)
    torch.library.opcheck(
        operator(f"{path}_backward").default,
        (torch.ones_like(output[0]), *output, needs, *args),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("path", BACKENDS[1:])
def test_fake_shapes_dtypes_and_strides_equal_the_real_ones(path):
    forward = operator(f"{path}_forward")
    for chosen in CASES.values():
        case = make_case(length=5, batch=2, **chosen)
        real = forward(*forward_args(case))
        with FakeTensorMode() as mode:
            fake = forward(*forward_args(case.map(mode.from_tensor)))
        meta = case.map(lambda x: x.to("meta"))
        for x, y, z in zip(real, fake, forward(*forward_args(meta)), strict=True):
            assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride()) == (z.shape, z.dtype, z.stride())


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_the_door_takes_meta_tensors(backend):
    case = make_case(length=5, batch=2).map(lambda x: x.to("meta").requires_grad_())
    o = case.run(backend, attention_mask=torch.ones(2, 5, device="meta").bool())
    o.sum().backward()
    assert (o.shape, o.dtype, o.device.type) == (case.tensors["v"].shape, torch.float64, "meta")
    assert all(x.grad.shape == x.shape for x in case.tensors.values())


def compiled(case: Case, backend: str, compiler: Any, **kwargs: Any):
    names = list(case.tensors)

    # the reference is traced operation by operation: with sizes that are symbols that takes ten times as long
    @torch.compile(fullgraph=True, dynamic=backend != "reference", backend=compiler)
    def run(*tensors: torch.Tensor) -> torch.Tensor:
        return case.with_tensors(dict(zip(names, tensors, strict=True))).run(backend, **kwargs)

    return lambda c: run(*c.tensors.values())


@pytest.mark.parametrize(
    ("backend", "chosen", "seen"),
    [
        # the reference's hundreds of operations, which are PyTorch's, take seconds to trace
        *(pytest.param(b, {}, SEEN["plain"], marks=[pytest.mark.slow] * (b == "reference")) for b in BACKENDS),
        ("auto", {"max_lag": 3}, SEEN["mask"]),
        ("auto", {}, SEEN["packed"]),
        ("auto", {"causal": False}, SEEN["mask"]),
    ],
)
def test_compiled_equals_eager(backend, chosen, seen):
    case = make_case(length=5, **chosen)
    kwargs = dict(zip(("attention_mask", "cu_seqlens"), seen, strict=True))
    expected = evaluate(case, lambda c: c.run(backend, **kwargs))
    assert_close(evaluate(case, compiled(case, backend, "aot_eager", **kwargs)).named(), expected.named())


def test_two_lengths_compile_once():
    counter = CompileCounterWithBackend("aot_eager")
    run, first = compiled(make_case(length=5, max_lag=16), "chunked", counter), 0
    for length in (5, 9, 12):
        case = make_case(length=length, max_lag=16)
        assert_close({"o": run(case)}, {"o": case.run("chunked")})
        # compiling may start over once, but only at the first length
        first = counter.frame_count if length == 5 else first
    assert counter.frame_count == first


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_equals_eager():
    case = make_case(length=20, dtype=torch.float32)
    expected = evaluate(case, lambda c: c.run("chunked"))
    found = evaluate(case, compiled(case, "chunked", "inductor"))
    assert_close(found.named(), expected.named(), rtol=1e-4)


class Exported(torch.nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.options = dict(case.operator_options.items())
        self.mix = torch.nn.ParameterList([case.tensors[f"routing.{n}"] for n in ("diag", "down", "up")])

    def forward(self, q, k, v, attention_mask=None):
        case = Case({"q": q, "k": k, "v": v}, self.options | {"routing_identity": True, "readout_identity": True})
        return case.run("auto", lambda q, k, v, *_, **o: _door(q, k, v, self.mix, **o), attention_mask=attention_mask)


def _door(q, k, v, tables, **options):
    from hypermlp.ops import hyper_attention

    return hyper_attention(q, k, v, SequenceMix(*tables), **options)


@pytest.mark.parametrize("masked", [False, True])
def test_export_with_a_dynamic_length(masked):
    module = Exported(make_case(length=6, max_lag=8))

    def inputs(length: int):
        case = make_case(1, length=length)
        mask = (torch.ones(1, length, dtype=torch.long),) if masked else ()
        return (*(case.tensors[n] for n in "qkv"), *mask)

    length = torch.export.Dim("length", min=2, max=4096)
    shapes = ({1: length},) * (4 if masked else 3)
    program = torch.export.export(module, inputs(6), dynamic_shapes=shapes)
    assert any("chunked_forward" in str(node.target) for node in program.graph.nodes)
    for other in (6, 8, 30):
        assert_close({"o": program.module()(*inputs(other))}, {"o": module(*inputs(other))})
