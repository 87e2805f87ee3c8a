#!/usr/bin/env bash
# opacus 1.6.0, torch 2.13.0: per-sample gradients of a convolution with padding_mode "circular", "reflect" or
# "replicate".
#
# Expected: the gradient that each sample has alone, as with padding_mode="zeros", or a refusal.
# Seen: the gradient of a convolution that pads with zeros, without a word: what is clipped and trained with is another
# model's gradient. With force_functorch=True it is right.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 opacus==1.6.0 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import copy
import warnings

import torch
from opacus import GradSampleModule
from opacus.validators import ModuleValidator
from torch import nn

warnings.simplefilter("ignore")
for mode in ("zeros", "circular", "reflect", "replicate"):
    torch.manual_seed(0)
    x = torch.randn(3, 4, 9, dtype=torch.float64)
    model = nn.Conv1d(4, 4, 3, padding=1, padding_mode=mode).double()
    refused = ModuleValidator.validate(model, strict=False)
    right = torch.stack([torch.autograd.grad(model(row[None]).square().sum(), model.weight)[0] for row in x])
    error = []
    for functorch in (False, True):
        private = GradSampleModule(copy.deepcopy(model), loss_reduction="sum", force_functorch=functorch)
        private(x).square().sum().backward()
        error.append(((private._module.weight.grad_sample - right).norm() / right.norm()).item())
    print(f"{mode}: relative error by default {error[0]:.2g}, by functorch {error[1]:.2g}; refused: {refused}")
    assert not refused and error[1] < 1e-12
    assert error[0] < 1e-12 if mode == "zeros" else error[0] > 0.01
PY
