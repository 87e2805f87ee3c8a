#!/usr/bin/env bash
# local-attention 1.11.2, torch 2.13.0: LocalAttention(autopad=True), not causal, at a length that is no multiple of the
# window.
#
# Expected: each token sees the tokens of its own and the neighbouring windows, as with causal=True, and as with a mask of
# ones.
# Seen: without a mask the zeros that it pads with count as tokens: their scores of 0 take weight from the real ones. A
# text answers differently with autopad than by attention written out, and nothing is said.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 local-attention==1.11.2 einops==0.8.2 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import warnings

import torch
from local_attention import LocalAttention
from torch.nn.functional import scaled_dot_product_attention

warnings.simplefilter("error")
torch.manual_seed(0)
for causal in (True, False):
    for length in (16, 14):
        q, k, v = torch.randn(3, 2, 3, length, 8)
        i, j = torch.arange(length)[:, None], torch.arange(length)
        seen = (j // 4 - i // 4).abs() <= 1
        if causal:
            seen &= j <= i
        right = scaled_dot_product_attention(q, k, v, seen)
        local = LocalAttention(window_size=4, causal=causal, autopad=True, use_rotary_pos_emb=False)
        ones = torch.ones(2, length, dtype=torch.bool)
        plain, masked = ((local(q, k, v, **mask) - right).abs().max().item() for mask in ({}, {"mask": ones}))
        print(f"causal={causal}, {length} tokens in windows of 4: off by {plain:.2g}, with a mask of ones by {masked:.2g}")
        assert masked < 1e-5 and ((plain > 0.1) if (not causal and length == 14) else (plain < 1e-5))
PY
