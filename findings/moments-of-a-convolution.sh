#!/usr/bin/env bash
# backpack-for-pytorch 1.7.1, torch 2.13.0: gradients per sample and what is made of them (BatchGrad, BatchL2Grad,
# SumGradSquared, DiagGGNExact) for a convolution with padding_mode, with groups, and with padding="same".
#
# Expected: what autograd has sample by sample, as for a plain convolution, or a NotImplementedError, as an embedding
# with padding_idx and many others give.
# Seen: other numbers, silently. Another padding_mode than zeros is taken for zeros by all of them; with groups the
# norms of BatchL2Grad are of something else; with padding="same" and an even kernel BatchGrad pads on the wrong side.
# (private-convolution-and-its-padding.sh is about another library.)
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 backpack-for-pytorch==1.7.1 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import warnings

import torch
from backpack import backpack, extend
from backpack.extensions import BatchGrad, BatchL2Grad, DiagGGNExact, SumGradSquared
from torch import nn

warnings.simplefilter("ignore")
torch.set_default_dtype(torch.float64)
cases = {
    "plain": ({"padding": 1}, ()),
    "circular": (
        {"padding": 1, "padding_mode": "circular"},
        ("BatchGrad", "BatchL2Grad", "SumGradSquared", "DiagGGNExact"),
    ),
    "reflect": (
        {"padding": 1, "padding_mode": "reflect"},
        ("BatchGrad", "BatchL2Grad", "SumGradSquared", "DiagGGNExact"),
    ),
    "groups": ({"padding": 1, "groups": 2}, ("BatchL2Grad",)),
    "same": ({"padding": "same", "kernel_size": 4}, ("BatchGrad", "SumGradSquared")),
}
for name, (options, expected) in cases.items():
    torch.manual_seed(0)
    x, target = torch.randn(3, 4, 7), torch.randn(3, 2)
    layer = nn.Conv1d(4, 4, **{"kernel_size": 3, **options})
    net, loss = (
        extend(nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(28, 2))),
        extend(nn.MSELoss(reduction="sum")),
    )
    weight = layer.weight
    alone = torch.stack(
        [torch.autograd.grad((net(a[None]) - b).square().sum(), weight)[0] for a, b in zip(x, target, strict=True)]
    )
    jacobian = torch.stack([torch.autograd.grad(out, weight, retain_graph=True)[0] for out in net(x).flatten()])
    right = {
        "grad_batch": alone,
        "batch_l2": alone.flatten(1).square().sum(1),
        "sum_grad_squared": alone.square().sum(0),
        "diag_ggn_exact": 2 * jacobian.square().sum(0),
    }
    wrong = []
    for extension, (field, value) in zip(
        (BatchGrad, BatchL2Grad, SumGradSquared, DiagGGNExact), right.items(), strict=True
    ):
        with backpack(extension()):
            loss(net(x), target).backward()
        error = ((getattr(weight, field) - value).norm() / value.norm()).item()
        print(f"{name}, {extension.__name__}: off by {error:.2g} (relative)")
        assert error < 1e-10 or error > 0.01
        wrong += [extension.__name__] if error > 0.01 else []
    assert tuple(wrong) == expected, wrong
PY
