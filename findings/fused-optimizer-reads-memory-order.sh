#!/usr/bin/env bash
# torch 2.13.0: SGD, Adam, AdamW and Adagrad with fused=True on a CPU, with a gradient whose strides are not the
# parameter's, as torch.func.grad and torch.autograd.grad return it for a layer by einsum or a channels_last picture.
#
# Expected: the step that foreach=True and the loop take, or a refusal, as the project's issue 106951 has it from a GPU.
# Seen: parameter and gradient are read in the order of memory, so each entry moves by another entry's gradient,
# silently. (backward() is right: it copies gradients to the parameter's strides. p.grad = ... does not.)
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import warnings

import torch
from torch.nn.functional import conv2d

warnings.simplefilter("error")
torch.manual_seed(0)
x, picture = torch.randn(9, 5).double(), torch.randn(2, 4, 8, 8).double().to(memory_format=torch.channels_last)
losses = {
    "linear": (lambda w: torch.nn.functional.linear(x, w).square().sum(), torch.randn(6, 5).double()),
    "einsum": (lambda w: torch.einsum("ni,oi->no", x, w).square().sum(), torch.randn(6, 5).double()),
    "conv2d": (lambda w: conv2d(picture, w).square().sum(), torch.randn(6, 4, 3, 3).double()),
}
for name, (loss, start) in losses.items():
    for optimizer in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad):
        after = {}
        for way in ("loop", "foreach", "fused", "fused, backward()"):
            p = torch.nn.Parameter(start.clone())
            step = optimizer([p], lr=1e-3, foreach=way == "foreach", fused=way.startswith("fused"))
            for _ in range(3):
                if way == "fused, backward()":
                    step.zero_grad()
                    loss(p).backward()
                else:
                    p.grad = torch.func.grad(loss)(p.detach())
                    strides = p.grad.stride()
                step.step()
            after[way] = p.detach()
        moved = (after["loop"] - start).norm()
        error = {way: ((after[way] - after["loop"]).norm() / moved).item() for way in after}
        print(f"{name}, {optimizer.__name__}: strides {p.stride()}, of the gradient {strides}; off by", end=" ")
        print(", ".join(f"{value:.2g} ({way})" for way, value in error.items()))
        assert max(error["foreach"], error["fused, backward()"]) < 1e-10
        assert (error["fused"] < 1e-10) if name == "linear" else (error["fused"] > 0.1)
PY
