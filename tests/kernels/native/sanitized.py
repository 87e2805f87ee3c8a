"""Awkward shapes for AddressSanitizer and UBSan: every entry of the native kernels, forward and backward.

A script, not collected: ``test_native_sanitized.py`` runs it with the sanitizers' libraries loaded first.
"""

from __future__ import annotations

import itertools

import torch

from hypermlp.ops import decode, native
from hypermlp.ops.decode import StepArgs
from hypermlp.ops.short_conv import short_conv
from hypermlp_kernels.native import build
from tests.helpers import FULL, Case, evaluate, make_case
from tests.ops import test_native_step as steps

_SANITIZED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


def cases() -> list[tuple[Case, dict[str, torch.Tensor]]]:
    """Widths around whole blocks, lengths around whole tiles, and every way to see."""
    found = []
    widths = itertools.cycle([(1, 1, (1, 1)), (16, 16, (16, 16)), (17, 33, (20, 15)), (5, 40, (32, 3))])
    for length, chosen in itertools.product(
        (1, 2, 23, 24, 25, 49, 270),
        ({}, {"max_lag": 1}, {"max_lag": 30}, {"causal": False}, {"layout": "position"}, {"selection": "relu"}),
    ):
        qk, v, ranks = next(widths)
        parts = {"routing": FULL, "readout": FULL} if length % 2 else {"routing": ("diag",), "readout": ("low_rank",)}
        case = make_case(
            length, batch=2, length=length, qk=qk, v=v, ranks=ranks, dtype=torch.float32, **chosen, **parts
        )
        found += [(case, {}), (case, {"attention_mask": torch.rand(2, length) < 0.7})]
        packed = make_case(length, length=length, qk=qk, v=v, ranks=ranks, dtype=torch.float32, **chosen, **parts)
        third = length // 3
        found.append((packed, {"cu_seqlens": torch.tensor([third // 2, third, third, length])}))
    return found


def main() -> None:
    build._FLAGS = (*build._FLAGS, *_SANITIZED)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for case, seen in cases():
            evaluate(case, lambda c, seen=seen: c.run("native", **seen))
    half = make_case(length=50, dtype=torch.bfloat16)
    evaluate(half, lambda c: c.run("native"))
    for size, length, dtype in itertools.product((1, 3, 4, 9), (1, 5, 300, 600), (torch.float32, torch.bfloat16)):
        x, taps, past = (torch.randn(shape).to(dtype) for shape in ((1, length, 7), (7, size), (1, size - 1, 7)))
        bounds = torch.tensor([0, length // 2, length])
        for chosen in ({}, {"cu_seqlens": bounds}, {"past": past}):
            y = short_conv(x.requires_grad_(), taps.requires_grad_(), **chosen, backend="native")
            y.sum().backward()
    for q, past, routing, readout, options in steps.CASES.values():
        for order in steps.PASTS.values():
            if past.keys[0].shape[2] + sum(k.shape[2] for k in past.keys[1:]) == 21:
                native.decode_step(StepArgs(q, order(past), routing, readout, options))
        torch.testing.assert_close(
            native.decode_step(StepArgs(q, past, routing, readout, options)),
            decode.decode_step(StepArgs(q, past, routing, readout, options)),
        )
    print("sanitized")


if __name__ == "__main__":
    main()
