#!/usr/bin/env bash
# peft 0.21.2 (transformers 5.24.0), torch 2.13.0: OFT on an nn.Conv2d whose kernel is larger than 1.
#
# Expected: a fresh adapter, a rotation by nothing, leaves the answer as it is, as with a kernel of 1; and merging an
# adapter does not change the function.
# Seen: the input is cut into overlapping patches, rotated, and laid together again by a sum whose axes are in another
# order: pixels count several times and at other places. A fresh adapter answers something else before any training. What
# is merged is the rotated filter, so a trained adapter is another function once merged. Not a word of it.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 peft==0.21.2 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import warnings

import torch
from peft import OFTConfig, get_peft_model
from torch import nn

warnings.simplefilter("error")
x = torch.randn(2, 4, 12, 12, dtype=torch.float64)
for kernel in (1, 3):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(4, 8, kernel)).double()
    with torch.no_grad():
        right = base(x)
        model = get_peft_model(base, OFTConfig(oft_block_size=4, r=0, target_modules=["0"])).double().eval()
        fresh = (model(x) - right).norm() / right.norm()
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.1 * torch.randn_like(parameter))
        trained = model(x)
        merged = (model.merge_and_unload()(x) - trained).norm() / trained.norm()
    print(f"kernel of {kernel}: relative error of a fresh adapter {fresh:.2g}, of merging a trained one {merged:.2g}")
    assert max(fresh, merged) < 1e-10 if kernel == 1 else min(fresh, merged) > 0.5
PY
