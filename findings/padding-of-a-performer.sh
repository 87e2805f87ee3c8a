#!/usr/bin/env bash
# performer-pytorch 1.1.4 (local-attention 1.11.2), torch 2.13.0: its attention beside padding with a mask, and a causal
# one beside later tokens.
#
# Expected: with a mask the answers of the tokens alone, whatever stands in the padding, as its local heads have it; and
# causal answers do not change with later tokens.
# Seen: the mask empties the values of hidden keys and leaves the keys in the sum that answers are divided by: answers
# shrink with the padding, by as much as what stands in it says, silently, with every kind of kernel. Causal softmax
# kernels are scaled by the largest key of the whole text, so one later token with a large key drowns what came before
# in the kernel's eps.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 performer-pytorch==1.1.4 \
  local-attention==1.11.2 setuptools==80.9.0 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import warnings

import torch

warnings.simplefilter("ignore")  # of the package's imports
from performer_pytorch import SelfAttention


def off(found, right):
    return ((found - right).norm() / right.norm()).item()


torch.manual_seed(0)
text, mask = torch.randn(2, 8, 32), (torch.arange(16) < 8).expand(2, 16)
kinds = {
    "softmax": {},
    "generalized": {"generalized_attention": True},
    "no projection": {"no_projection": True},
    "local heads alone": {"local_heads": 4, "local_window_size": 4},
}
for name, options in kinds.items():
    torch.manual_seed(0)
    layer = SelfAttention(dim=32, heads=4, dim_head=8, attn_out_bias=False, **options).eval()
    first, second = (torch.cat((text, torch.randn(2, 8, 32)), dim=1) for _ in range(2))
    with torch.no_grad():
        alone, padded, other = layer(text), layer(first, mask=mask)[:, :8], layer(second, mask=mask)[:, :8]
    print(
        f"{name}: padding changes answers by {off(padded, alone):.2g}, other padding by {off(other, padded):.2g} (relative)"
    )
    right = name == "local heads alone"
    assert (off(padded, alone) < 1e-5) if right else (off(padded, alone) > 0.2 and off(other, padded) > 0.02)

for name, options in {"softmax": {}, "generalized": {"generalized_attention": True}}.items():
    torch.manual_seed(0)
    layer = SelfAttention(dim=32, heads=4, dim_head=8, causal=True, **options).eval()
    later = torch.cat((text, 8 * torch.randn(2, 1, 32)), dim=1)
    with torch.no_grad():
        change = off(layer(later)[:, :8], layer(text))
    print(f"{name}, causal: a later token 8 times as large changes answers by {change:.2g} (relative)")
    assert (change > 0.05) if name == "softmax" else (change < 1e-5)
PY
