#!/usr/bin/env bash
# peft 0.21.2 (transformers 5.24.0), torch 2.13.0: adapter_names, which says row by row which adapter answers, with
# adapters that are not LoRA.
#
# Expected: each row has its adapter's answer, as with LoRA, or an error, as LoRA with DoRA gives.
# Seen: with LoHa, OFT, VeRA and others the names are dropped without a word: the active adapter answers every row,
# those of "__base__" too.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 peft==0.21.2 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import warnings

import peft
import torch
from torch import nn

warnings.simplefilter("error")
options = {
    "LoraConfig": {"r": 2}, "LoHaConfig": {"r": 2}, "LoKrConfig": {"r": 2}, "VeraConfig": {"r": 2},
    "OFTConfig": {"oft_block_size": 4}, "IA3Config": {"feedforward_modules": []}, "FourierFTConfig": {"n_frequency": 8},
}
x = torch.randn(3, 8)
found = {}
for name, own in options.items():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8))
    right = [base(x)]
    config = getattr(peft, name)(target_modules=["0"], **own)
    model = peft.get_peft_model(base, config, adapter_name="first")
    model.add_adapter("second", config)
    with torch.no_grad():
        for adapter in ("first", "second"):
            model.set_adapter(adapter)
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.add_(0.3 * torch.randn_like(parameter))
            right.append(model.eval()(x))
        rows = model(x, adapter_names=["__base__", "first", "second"])
        found[name] = [round((rows[i] - right[i][i]).abs().max().item(), 4) for i in range(3)]
    print(f"{name}: rows of the base, the first and the second adapter off by {found[name]}")
assert found.pop("LoraConfig") == [0, 0, 0]
assert all(base > 1e-3 and first > 1e-3 and second == 0 for base, first, second in found.values())
PY
