#!/usr/bin/env bash
# torch 2.13.0: the forward-mode derivative of an operator made by torch.library.custom_op that has no rule for it.
#
# Expected: an error that says that the operator has no forward-mode derivative, as autograd.Function and operators
# without a derivative formula give.
# Seen: torch.func.jvp returns zero and torch.autograd.forward_ad a dual without tangent, for x * x at 3, where it is 6;
# the same with a backward registered.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import torch
from torch.autograd import forward_ad


@torch.library.custom_op("demo::square", mutates_args=())
def square(x: torch.Tensor) -> torch.Tensor:
    return x * x


def setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


square.register_fake(torch.empty_like)
x = torch.tensor([3.0])
for backward in ("without", "with"):
    if backward == "with":
        square.register_autograd(lambda ctx, grad: 2 * ctx.saved_tensors[0] * grad, setup_context=setup_context)
    _, tangent = torch.func.jvp(square, (x,), (torch.ones(1),))
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(square(forward_ad.make_dual(x, torch.ones(1))))
    print(f"{backward} a backward: jvp {tangent.item()} (right: 6.0), dual tangent {dual.tangent}")
    assert tangent.item() == 0 and dual.tangent is None
PY
