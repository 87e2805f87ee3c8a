#!/usr/bin/env bash
# torch 2.13.0: nn.MultiheadAttention with add_bias_kv=True or add_zero_attn=True, called with a causal mask and
# is_causal=True, which says that the mask is one.
#
# Expected: what the mask gives without the hint: the extra key, learned or zero, is there for every query.
# Seen: with need_weights=False the hint takes the mask's place before the extra key is appended, which is then the last
# of the keys, "later" than every query: none attends to it, silently, and the learned bias_k and bias_v get no
# gradient. need_weights=True, its default, a key_padding_mask beside it, or no hint are right.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import warnings

import torch
from torch import nn

warnings.simplefilter("error")
mask = nn.Transformer.generate_square_subsequent_mask(6)
for options in ({}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"add_bias_kv": True, "add_zero_attn": True}):
    torch.manual_seed(0)
    layer, x = nn.MultiheadAttention(16, 2, batch_first=True, **options), torch.randn(2, 6, 16)
    right, weights = (layer(x, x, x, attn_mask=mask, need_weights=need)[0] for need in (False, True))
    hinted = layer(x, x, x, attn_mask=mask, is_causal=True)[0]
    found = layer(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
    errors = [((other - right).norm() / right.norm()).item() for other in (weights, hinted, found)]
    print(
        "{}: with weights off by {:.2g}, with the hint by {:.2g}, with the hint and no weights by {:.2g} (relative)".format(
            options, *errors
        )
    )
    assert max(errors[:2]) < 1e-5 and ((errors[2] > 0.1) if options else (errors[2] < 1e-5))
    if "add_bias_kv" in options:
        gradients = [torch.autograd.grad(out.square().sum(), layer.bias_v)[0].norm().item() for out in (right, found)]
        print(f"  gradient of bias_v: {gradients[0]:.2g}, with the hint and no weights {gradients[1]:.2g}")
        assert gradients[0] > 0.1 and gradients[1] == 0
PY
