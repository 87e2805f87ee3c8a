#!/usr/bin/env bash
# peft 0.21.2 (transformers 5.24.0), torch 2.13.0: two active adapters of one kind on an nn.Linear, unmerged and merged.
#
# Expected: merging does not change the function, as with two of LoRA, LoHa, HRA or IA3, and with one of any kind.
# Seen: two of OFT or of C3A are another function once merged, silently. Unmerged, OFT rotates the input by the first and
# then by the second; merged, by the second and then by the first. C3A's second adapter reads what the first one answered
# for the input; merged, both read the input. (The project's pull request 3164, closed, is about C3A.)
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
    "LoraConfig": {"r": 2}, "LoHaConfig": {"r": 2}, "HRAConfig": {"r": 2},
    "IA3Config": {"feedforward_modules": []}, "OFTConfig": {"oft_block_size": 4, "r": 0}, "C3AConfig": {"block_size": 4},
}
x = torch.randn(5, 8, dtype=torch.float64)
for name, own in options.items():
    found = []
    for active in (["first"], ["second"], ["first", "second"]):
        torch.manual_seed(0)
        config = getattr(peft, name)(target_modules=["0"], **own)
        model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config, adapter_name="first")
        model.add_adapter("second", config)
        model = model.double().eval()
        with torch.no_grad():
            for adapter in ("first", "second"):
                model.set_adapter(adapter)
                for parameter in (p for p in model.parameters() if p.requires_grad):
                    parameter.add_(0.3 * torch.randn_like(parameter))
            model.base_model.set_adapter(active)
            unmerged = model(x)
            found.append(((model.merge_and_unload()(x) - unmerged).norm() / unmerged.norm()).item())
    print(f"{name}: merging the first, the second, both changes the answer by " + ", ".join(f"{v:.2g}" for v in found))
    assert max(found[:2]) < 1e-6
    assert (found[2] > 0.01) if name in ("OFTConfig", "C3AConfig") else (found[2] < 1e-6)
PY
