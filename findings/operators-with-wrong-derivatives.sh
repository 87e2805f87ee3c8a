#!/usr/bin/env bash
# torch 2.13.0: first derivatives of five operators, against differences in float64.
#
# Expected: the derivative in every way that gives one, as most operators have it, or an error.
# Seen: wrong numbers, silently. torch.func.jacrev of cdist, which batches the backward (chunk_size=1 is right); backward of
# as_strided_scatter, which keeps the gradient of entries that were written over; forward mode by a cross entropy's class
# weights, which is zero (backward refuses); and forward mode of cholesky_inverse and scatter_reduce("prod"). (The
# project's open issue 198017 lists the last two.)
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import warnings

import torch
from torch.func import jacfwd, jacrev

warnings.simplefilter("error")
warnings.simplefilter("ignore", DeprecationWarning)  # of what torch itself calls
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
x, other, labels = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 1, 2, 4])
index, spread = torch.tensor([[0, 0, 1, 1, 2]] * 4), torch.randn(4, 4)
factor = torch.linalg.cholesky(spread @ spread.T + torch.eye(4))
cases = {
    "cdist": (lambda a: torch.cdist(a, other), x, "jacrev"),
    "as_strided_scatter": (lambda a: a.as_strided_scatter(other[:2, :2], (2, 2), (5, 1)), x, "backward, jacrev"),
    "cross_entropy by weights": (
        lambda w: torch.nn.functional.cross_entropy(x, labels, weight=w), torch.rand(5) + 0.5, "jacfwd",
    ),
    "cholesky_inverse": (lambda a: torch.cholesky_inverse(a.tril()), factor, "jacfwd"),
    "scatter_reduce prod": (lambda a: torch.ones(4, 3).scatter_reduce(1, index, a, "prod"), x, "jacfwd"),
}
ways = {"backward": torch.autograd.functional.jacobian, "jacrev": lambda f, a: jacrev(f)(a), "jacfwd": lambda f, a: jacfwd(f)(a)}
for name, (function, value, expected) in cases.items():
    steps = 1e-6 * torch.eye(value.numel()).view(-1, *value.shape)
    right = torch.stack([(function(value + d) - function(value - d)).flatten() / 2e-6 for d in steps], dim=-1)
    wrong = []
    for way, derivative in ways.items():
        try:
            found = derivative(function, value).reshape(right.shape)
        except RuntimeError as error:  # NotImplementedError is one
            print(f"{name}, {way}: {str(error)[:60]}...")
            continue
        error = ((found - right).norm() / right.norm()).item()
        print(f"{name}, {way}: off by {error:.2g} (relative)")
        assert error < 1e-6 or error > 0.1
        wrong += [way] if error > 0.1 else []
    assert ", ".join(wrong) == expected, wrong
PY
