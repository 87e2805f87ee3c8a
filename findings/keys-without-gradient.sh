#!/usr/bin/env bash
# product-key-memory 0.3.0, torch 2.13.0: PKM with concat_values_and_combine=True.
#
# Expected: the values that a query finds are weighted by its scores, as by default, so that keys and queries learn.
# Seen: the values found are added up as they are, silently; the scores count for nothing but which ones. Keys, queries,
# their norm and the layer's input get no gradient, with either kind of gates, and stay as they were started.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 product-key-memory==0.3.0 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import warnings

import torch

warnings.simplefilter("ignore")  # of the packages that it imports
from product_key_memory import PKM

for concat in (False, True):
    for gates in ("softmax", "ReLU"):
        torch.manual_seed(0)
        options = {"concat_values_and_combine": concat, "non_competitive_gates": gates == "ReLU"}
        layer = PKM(dim=32, heads=2, num_keys=16, topk=4, dim_head=8, attn_dropout=0.5, **options)
        x = torch.randn(2, 6, 32, requires_grad=True)
        answer = layer(x)
        answer.square().sum().backward()
        without = [name for name, p in (*layer.named_parameters(), ("input", x)) if p.grad is None]
        dropped = (layer.eval()(x) - answer).norm().item()
        print(f"{options}: no gradient for {without}; attn_dropout changes the answer by {dropped:.2g}")
        keys = ["keys", "to_queries.weight", "norm.weight", "norm.bias", "input"]
        assert (without == keys and dropped == 0) if concat else (not without and dropped > 0)
PY
