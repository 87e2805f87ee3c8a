#!/usr/bin/env bash
# torch 2.13.0 (2.15.0 as well): torch.nn.utils.parametrizations.orthogonal of an nn.Linear that is not square, which by
# default is made of Householder reflections, and one step of an optimizer with weight decay.
#
# Expected: an orthogonal weight after every step, as of a square layer, and as is the point of the parametrisation.
# Seen: a weight of zeros after the first step of AdamW with its defaults, silently and for good. The parameter's
# diagonal holds the signs of the reflections, 1 and -1, which have no gradient and are cast to integers: weight decay
# makes them 0.99999 and so 0.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import warnings

import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal

warnings.simplefilter("error")
optimizers = {
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "SGD with weight decay": lambda p: torch.optim.SGD(p, lr=1e-3, weight_decay=1e-4),
}
for sizes in ((8, 8), (8, 6), (6, 8)):
    for name, make in optimizers.items():
        torch.manual_seed(0)
        layer, x, y = orthogonal(nn.Linear(*sizes)), torch.randn(16, sizes[0]), torch.randn(16, sizes[1])
        optimizer = make(layer.parameters())
        norms = [layer.weight.norm().item()]
        for _ in range(5):
            optimizer.zero_grad()
            (layer(x) - y).square().mean().backward()
            optimizer.step()
            norms.append(layer.weight.norm().item())
        print(f"nn.Linear{sizes}, {name}: norms of the weight, step by step: {[round(norm, 3) for norm in norms]}")
        assert abs(norms[0] - min(sizes) ** 0.5) < 1e-5
        lost = sizes[0] != sizes[1] and name != "Adam"
        assert all(norm == 0 for norm in norms[1:]) if lost else abs(norms[-1] - norms[0]) < 1e-4
PY
