#!/usr/bin/env bash
# opacus 1.6.0, torch 2.13.0: private training of a model whose nn.Embedding has a padding_idx.
#
# Expected: what holds without opacus: padding contributes no gradient and its vector stays as it is, here without
# noise.
# Seen: each sample's gradient has that of its padding, too; it counts in the norm that is clipped by, and the vector of
# padding is trained. Shorter texts, which have more padding, are clipped by more.
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
from opacus.optimizers import DPOptimizer
from torch import nn

warnings.simplefilter("ignore")
torch.manual_seed(0)
texts = torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0], [5, 0, 0, 0]])
plain = nn.Sequential(nn.Embedding(10, 4, padding_idx=0), nn.Flatten(), nn.Linear(16, 2)).double()
private = copy.deepcopy(plain)
sampled = GradSampleModule(private, loss_reduction="sum")
optimizer = torch.optim.SGD(private.parameters(), lr=1.0)
optimizer = DPOptimizer(optimizer, noise_multiplier=0.0, max_grad_norm=1e6, expected_batch_size=1)
sampled(texts).sum().backward()
norms = private[0].weight.grad_sample.flatten(1).norm(dim=1)
right = torch.stack([torch.autograd.grad(plain(row[None]).sum(), plain[0].weight)[0].norm() for row in texts])
optimizer.step()
plain(texts).sum().backward()
torch.optim.SGD(plain.parameters(), lr=1.0).step()
print(f"norms of the samples' gradients: {norms.tolist()}, right: {right.tolist()}")
print(f"vector of padding afterwards: {private[0].weight[0].tolist()}, without opacus: {plain[0].weight[0].tolist()}")
assert torch.allclose(private[0].weight[1:], plain[0].weight[1:])
assert torch.equal(plain[0].weight[0], torch.zeros(4, dtype=torch.float64))
assert private[0].weight[0].norm() > 0.1 and norms[2] > 1.1 * right[2]
PY
