#!/usr/bin/env bash
# torch 2.13.0: an optimizer with lr=torch.tensor(...) (which torch.compile is helped by), two groups of parameters and
# a scheduler with a factor for each.
#
# Expected: each group has its own learning rate, as with a float, and the caller's tensor is left as it was.
# Seen: both groups hold the caller's tensor itself, and a scheduler writes into it: the last group's rate is every
# group's, silently. A second optimizer made from the same tensor starts from what the first one's scheduler left.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import warnings

import torch

warnings.simplefilter("error")


def rates(lr):
    body, head = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = torch.optim.AdamW([{"params": [body]}, {"params": [head]}], lr=lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 0.01, lambda step: 1.0 / (step + 1)])
    (body.sum() + head.sum()).backward()
    optimizer.step()
    scheduler.step()
    return [round(float(group["lr"]), 6) for group in optimizer.param_groups]


tensor = torch.tensor(0.1)
found = {"float": rates(0.1), "tensor": rates(tensor)}
print("learning rates of the two groups:", found, "| the caller's tensor:", tensor.item())
assert found["float"] == [0.001, 0.05]
assert found["tensor"] == [0.05, 0.05] and abs(tensor.item() - 0.05) < 1e-6
PY
