"""Sizes that overflow 32-bit offsets and lengths that no dense map fits: one at a time, they fill the memory."""

import pytest
import torch
from place import DEVICE, ON_GPU
from torch import Tensor

from hypermlp.ops import SequenceMix, hyper_attention
from hypermlp.ops.reference import hyper_attention_reference
from tests.helpers import Case, make_case

GIB = 2**30
if not ON_GPU:
    pytest.skip("needs a GPU: these are large", allow_module_level=True)


def need(gib: float) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / GIB
    if free < gib:
        pytest.skip(f"needs {gib} GiB of GPU memory, {free:.1f} are free")


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


@pytest.mark.slow
def test_more_than_2_to_the_31_values() -> None:
    """The last batch row, past the 32-bit offsets, is computed as if it were alone."""
    need(30)
    batch, length, width = 5, 1 << 18, 2048
    q, k, v = normal(batch, length, 2, 16), normal(batch, length, 2, 16), normal(batch, length, 1, width)
    assert v.numel() > 2**31
    o = hyper_attention(q, k, v, max_lag=64, backend="triton")
    alone = hyper_attention(q[-1:], k[-1:], v[-1:], max_lag=64, backend="triton")
    assert torch.isfinite(alone).all()
    assert torch.equal(o[-1:], alone)


@pytest.mark.slow
@pytest.mark.parametrize("gradient", [False, True])
def test_tokens_more_than_2_to_the_31_numbers_apart(gradient: bool) -> None:
    """Streams that lie far apart in one buffer equal the same streams packed densely."""
    need(30)
    length, apart = 1 << 15, 1 << 17
    buffer = torch.empty(length, apart, device=DEVICE, dtype=torch.bfloat16)
    assert buffer.numel() > 2**31
    table = 0.1 * torch.randn(2, 64, 4, device=DEVICE)
    dense = [normal(1, length, 2, 16), normal(1, length, 2, 16), normal(1, length, 1, 32)]
    gate = torch.rand(1, length, 2, 4, device=DEVICE, dtype=torch.bfloat16)
    spread, column = [], 0
    for x in (*dense, gate):
        width = x[0, 0].numel()
        part = buffer[:, column : column + width]
        part.copy_(x.view(length, width))
        spread.append(part.view(1, length, *x.shape[2:]))
        column += width
    found = []
    for *streams, opened in ([*dense, gate], spread):
        streams = [x.detach().requires_grad_(gradient) for x in streams]
        o = hyper_attention(*streams, SequenceMix(None, table, table, opened), backend="triton")
        found.append([o.detach(), *(torch.autograd.grad(o.float().square().sum(), streams) if gradient else ())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("selection", ["glu", "relu"])
def test_a_row_of_twenty_thousand(selection: str) -> None:
    """Against the chunked path in float64, by the rule: at most twice what bfloat16 costs the dense equations."""
    need(40)
    case = make_case(length=20_011, heads=1, qk=16, v=32, ranks=(4, 4), selection=selection, dtype=torch.bfloat16)
    # rows this long: tables small enough for their sums to stay near the scores themselves
    tables = {name: x * 0.02 for name, x in case.tensors.items() if x.ndim < 4}
    case = case.with_tensors(tables).map(lambda x: x.to(DEVICE))
    with torch.no_grad():
        truth = case.map(lambda x: x.double()).run("chunked")
        plain = bfloat16_reference(case)
        ours = case.run("triton")
    lost = float((plain.double() - truth).abs().max())
    made = float((ours.double() - truth).abs().nan_to_num(float("inf")).max())
    assert made <= 2 * lost + torch.finfo(torch.bfloat16).eps * float(truth.abs().max())


def bfloat16_reference(case: Case) -> Tensor:
    q, k, v = (case.tensors[name] for name in "qkv")
    options = case.operator_options | {"layout": "lag", "max_lag": case.tensors["q"].shape[1]}
    return hyper_attention_reference(q, k, v, *case.mixes(), **options, compute_dtype=torch.bfloat16)
