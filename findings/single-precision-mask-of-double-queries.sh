#!/usr/bin/env bash
# torch 2.13.0, on x86 CPUs: scaled_dot_product_attention of float64 queries with a float32 mask, as
# nn.Transformer.generate_square_subsequent_mask and other helpers make it by default.
#
# Expected: the mask is added, as for float16 and bfloat16 queries, or refused, as a float64 mask of float32 queries is.
# Seen: in rows of 8 or 16 keys and more, every second four or eight of the mask's numbers (as many as a vector register
# holds) are taken for zeros: a causal mask lets the future through, silently, and so does nn.MultiheadAttention with
# one.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
cat > "$dir/mask.py" <<'PY'
import warnings

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

warnings.simplefilter("error")
torch.manual_seed(0)
causal = nn.Transformer.generate_square_subsequent_mask(64)
x = torch.randn(1, 2, 64, 16, dtype=torch.float64)
right = scaled_dot_product_attention(x, x, x, is_causal=True)
error = {
    str(mask.dtype): (scaled_dot_product_attention(x, x, x, mask) - right).abs().max().item()
    for mask in (causal, causal.double())
}
layer = nn.MultiheadAttention(32, 2, batch_first=True).double()
tokens = torch.randn(1, 64, 32, dtype=torch.float64)
other = torch.cat((tokens[:, :-8], torch.randn(1, 8, 32, dtype=torch.float64)), dim=1)
with torch.no_grad():
    first, second = (layer(t, t, t, attn_mask=causal, need_weights=False)[0] for t in (tokens, other))
future = (first - second)[:, :-8].abs().max().item()
print(f"by the mask's dtype off by {error}; other future tokens change a layer's answers by {future:.2g}")
assert causal.dtype == torch.float32 and error["torch.float64"] < 1e-12
assert error["torch.float32"] > 0.1 and future > 1e-3
PY
"$dir/bin/python" "$dir/mask.py"
