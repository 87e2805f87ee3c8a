#!/usr/bin/env bash
# monai 1.6.1, einops 0.8.1, torch 2.13.0: SABlock(use_flash_attention=True, dropout_rate=0.5), the self-attention of its vision
# transformers, after .eval().
#
# Expected: no dropout in evaluation, as with use_flash_attention=False: the same answer twice, and the same answer as the
# other path has with the same weights.
# Seen: the probability of dropout goes to scaled_dot_product_attention whatever the module's mode is. A model in
# evaluation answers differently each time, and not a word.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 monai==1.6.1 einops==0.8.1 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import warnings

warnings.simplefilter("ignore")
import torch
from monai.networks.blocks import SABlock

torch.manual_seed(0)
x = torch.randn(1, 9, 32)
plain = SABlock(32, 4, dropout_rate=0.5).eval()
flash = SABlock(32, 4, dropout_rate=0.5, use_flash_attention=True).eval()
flash.load_state_dict(plain.state_dict())
with torch.no_grad():
    twice = {name: float((block(x) - block(x)).abs().max()) for name, block in (("plain", plain), ("flash", flash))}
    flash.dropout_rate = 0.0
    apart = float((plain(x) - flash(x)).abs().max())
print("the same input twice, in evaluation:", twice, "| both paths without dropout:", apart)
assert twice["plain"] == 0
assert twice["flash"] > 0.01
assert apart < 1e-5  # without dropout the two paths agree: nothing else differs
PY
