"""One token against a cache, natively: equal to PyTorch's own operators in every order of slots."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hypermlp.ops import SequenceMix, decode, native
from hypermlp.ops.arguments import Options
from hypermlp.ops.decode import Past, StepArgs

pytestmark = pytest.mark.usefixtures("native_path")
B, H, K, R = 2, 2, 5, 3


def mix(heads: int, rows: int, rank: int = R, **missing: Any) -> SequenceMix:
    tables = {"diag": torch.randn(heads, rows), "down": torch.randn(heads, rows, rank)}
    tables |= {"up": torch.randn(heads, rows, rank), "core": torch.randn(B, heads, rank)}
    return SequenceMix(**({n: x.double() for n, x in tables.items()} | missing))


def case(slots: int = 21, parts: tuple[int, ...] = (21,), maps: int = 2, v: int = 7, rank: int = R, **options: Any):
    q = torch.randn(B, maps * H * K).double()
    keys, values = torch.randn(B * maps * H, K, slots).double(), torch.randn(B * H, slots, v).double()
    past = Past(list(keys.split(parts, 2)), list(values.split(parts, 1)), None)
    mixes = mix(maps * H, slots + 4, rank), mix(H, slots + 4, rank)
    chosen = {"selection": "glu" if maps == 2 else "relu", "norm": True, "eps": 1e-12} | options
    return q, past, *mixes, Options(**chosen, causal=True, layout="lag", max_lag=slots + 4)


def hidden(past: Past, valid: torch.Tensor) -> Past:
    """As a cache holds them: hidden tokens are zeros."""
    at, keys, values = 0, [], []
    for k, v in zip(past.keys, past.values, strict=True):
        here = valid[:, at : at + v.shape[1]]
        at += v.shape[1]
        keys.append(k * here.repeat_interleave(k.shape[0] // B, 0)[:, None])
        values.append(v * here.repeat_interleave(v.shape[0] // B, 0)[..., None])
    return past._replace(keys=keys, values=values, valid=valid)


def masked(past: Past) -> Past:
    return hidden(past, torch.rand(B, 21) < 0.6)


CASES = {
    "one segment": case(),
    "two segments": case(parts=(20, 1)),
    "one token": case(1, (1,)),
    "one map": case(maps=1),
    "no norm": case(norm=False),
    "wide": case(70, (69, 1), v=130, rank=16),
    "rank 20": case(rank=20),
}
PASTS = {
    "lag": lambda past: past,
    "masked": masked,
    "position": lambda past: past._replace(start=torch.tensor([0, 3])),
    "position, masked": lambda past: masked(past)._replace(start=torch.tensor([2, 3])),
    "ring, part full": lambda past: past._replace(length=torch.tensor(9)),
    "ring, full": lambda past: past._replace(length=torch.tensor(21)),
    "ring, wrapped": lambda past: past._replace(length=torch.tensor(50)),
    "ring, wrapped, masked": lambda past: masked(past)._replace(length=torch.tensor(50)),
}


def compare(q, past, routing, readout, options):
    step = StepArgs(q, past, routing, readout, options)
    torch.testing.assert_close(native.decode_step(step), decode.decode_step(step), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("native_case", CASES.values(), ids=CASES.keys())
def test_equals_the_operators(native_case):
    compare(*native_case)


@pytest.mark.parametrize("order", PASTS.values(), ids=PASTS.keys())
@pytest.mark.parametrize("maps", [1, 2])
def test_every_order_of_slots(order, maps):
    q, past, *rest = case(maps=maps)
    compare(q, order(past), *rest)


@pytest.mark.parametrize("missing", ["diag", "core", "identity", "low rank", "all"])
def test_missing_parts(missing):
    q, past, routing, readout, options = case()
    changes = {
        "diag": {"diag": None}, "core": {"core": None}, "identity": {"identity": False},
        "low rank": {"down": None, "up": None, "core": None}, "all": dict.fromkeys(("diag", "down", "up", "core")),
    }  # fmt: skip
    compare(q, past, *(mix._replace(**changes[missing]) for mix in (routing, readout)), options)


@pytest.mark.parametrize("transpose", [False, True], ids=["slots last", "width last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_types_are_widened_as_they_are_read(dtype, transpose):
    q, past, routing, readout, options = case(40, (30, 10))

    def narrow(x):
        return None if x is None else x.to(dtype)

    def stored(x):
        return narrow(x).mT.contiguous().mT if transpose else narrow(x)

    past = past._replace(keys=[stored(x) for x in past.keys], values=[stored(x) for x in past.values])
    routing, readout = (SequenceMix(*map(narrow, mix[:4])) for mix in (routing, readout))
    o = native.decode_step(StepArgs(narrow(q), past, routing, readout, options))
    assert o.dtype == dtype
    wide = past._replace(keys=[x.double() for x in past.keys], values=[x.double() for x in past.values])
    mixes = [SequenceMix(*(x.double() for x in mix[:4])) for mix in (routing, readout)]
    expected = decode.decode_step(StepArgs(narrow(q).double(), wide, *mixes, options))
    step = max(torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(o.double(), expected, rtol=step, atol=step * float(expected.abs().max()))


def test_a_row_with_no_visible_key_is_zero():
    q, past, *rest = case()
    o = native.decode_step(StepArgs(q, hidden(past, torch.zeros(B, 21, dtype=torch.bool)), *rest))
    assert not o.any()
