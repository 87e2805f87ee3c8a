#!/usr/bin/env bash
# peft 0.21.2 (transformers 5.24.0), torch 2.13.0: LoRA on convolutions with padding_mode or dilation.
#
# Expected: merging an adapter does not change the function, as for a plain convolution or one with a stride.
# Seen: the adapter's own convolution is made with the base's size, stride and padding alone: it pads with zeros and is
# not dilated. What was trained differs from what is merged, silently (dilation with a padding in numbers ends in a size
# error).
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 peft==0.21.2 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

warnings.simplefilter("error")
x = torch.randn(2, 8, 11, dtype=torch.float64)
for options, right in (
    ({"padding": 1}, True),
    ({"stride": 2}, True),
    ({"padding": 1, "padding_mode": "circular"}, False),
    ({"padding": "same", "padding_mode": "reflect"}, False),
    ({"padding": "same", "dilation": 2}, False),
):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Conv1d(8, 8, 3, **options)), config).double().eval()
    with torch.no_grad():
        adapted = model(x)
        difference = (model.merge_and_unload()(x) - adapted).abs().max().item()
    print(f"{options}: merging changes the answer by {difference:.2g}")
    assert (difference < 1e-10) if right else (difference > 0.1)
PY
