#!/usr/bin/env bash
# torchmetrics 1.9.0, torch 2.13.0: Perplexity of logits in float16 and in float32.
#
# Expected: the exponential of the cross entropy of the same logits, as PyTorch has it in float32.
# Seen: probabilities are made first and their logarithm is taken then, in the logits' dtype: one token of a probability
# below 3e-8 in float16 (below 1e-45 in float32) makes the perplexity of a text infinite, and in float16 so do 8000
# ordinary tokens in one call, whose sum of logarithms overflows. Silently.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 torchmetrics==1.9.0 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import warnings

import torch
from torch.nn.functional import cross_entropy
from torchmetrics.text import Perplexity

warnings.simplefilter("ignore")
torch.manual_seed(0)
found = {}
for name, dtype, tokens, surprise in (
    ("float16", torch.float16, 1000, 10), ("float16, one token unexpected", torch.float16, 1000, 20),
    ("float16, 8000 tokens", torch.float16, 8000, 10), ("float32, 8000 tokens", torch.float32, 8000, 10),
    ("float32, one token unexpected", torch.float32, 1000, 120),
):
    logits, target = torch.randn(1, tokens, 5000), torch.randint(0, 5000, (1, tokens))
    logits[0, 0, (target[0, 0] + 1) % 5000] = logits[0, 0, target[0, 0]] + surprise
    logits = logits.to(dtype)
    right = cross_entropy(logits[0].float(), target[0]).exp().item()
    found[name] = Perplexity()(logits, target).item() / right
    print(f"{name}: {found[name] * right:.0f}, by the cross entropy {right:.0f}")
assert all(abs(found[name] - 1) < 0.02 for name in ("float16", "float32, 8000 tokens"))
assert all(value == float("inf") for name, value in found.items() if name not in ("float16", "float32, 8000 tokens"))
PY
