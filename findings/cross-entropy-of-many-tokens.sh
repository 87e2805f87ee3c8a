#!/usr/bin/env bash
# torch 2.13.0, on a CPU: cross_entropy and nll_loss of float16 logits, reduction="mean", the default.
#
# Expected: the mean, as mse_loss and others have it in float16, and as reduction="none" and mean() have it: about 9
# here.
# Seen: infinity, silently, as soon as the sum is above float16's 65504: with 8000 tokens of a loss of 9; and with
# label_smoothing, which sums over the classes, too, with 10 tokens of 5000 classes. (The project's open issue 85791 is
# about several dimensions on a GPU.)
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import warnings

import torch
from torch.nn.functional import cross_entropy, mse_loss, nll_loss

warnings.simplefilter("error")
for tokens in (1, 10, 4000, 8000):
    torch.manual_seed(0)
    logits, labels = torch.randn(tokens, 5000).half(), torch.randint(0, 5000, (tokens,))
    found = {
        "cross_entropy": cross_entropy(logits, labels),
        "nll_loss": nll_loss(logits.log_softmax(1), labels),
        "label_smoothing=0.1": cross_entropy(logits, labels, label_smoothing=0.1),
        'reduction="none"': cross_entropy(logits, labels, reduction="none").mean(),
        "mse_loss of squares of 9": mse_loss(torch.full((tokens,), 3.0).half(), torch.zeros(tokens).half()),
    }
    found = {name: value.item() for name, value in found.items()}
    right = cross_entropy(logits.float(), labels).item()
    print(f"{tokens} tokens, in float32 {right:.3f}; in float16", ", ".join(f"{k} {v:.3f}" for k, v in found.items()))
    infinite = [name for name, value in found.items() if value == float("inf")]
    expected = (["cross_entropy", "nll_loss"] if tokens == 8000 else []) + (
        ["label_smoothing=0.1"] if tokens > 1 else []
    )
    assert infinite == expected and all(
        abs(value - right) < 0.1 for name, value in found.items() if "mse" not in name and name not in infinite
    )
PY
