#!/usr/bin/env bash
# peft 0.21.2 (transformers 5.24.0, torch 2.13.0): modules_to_save with the name of an nn.Parameter, or of nothing.
#
# Expected: the parameter is trained and saved, or an error says that the name matches no module, as a name in
# target_modules that matches nothing is an error.
# Seen: nothing is said; the parameter stays frozen and is not in the checkpoint. A name that stands for nothing at all is
# passed over in the same way.
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


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.table = nn.Linear(4, 4), nn.LayerNorm(4), nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return self.norm(self.linear(x) + self.table)


def trained(**options):
    model = get_peft_model(Model(), LoraConfig(**options))
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    by_module = trained(target_modules=["linear"], modules_to_save=["norm"])
    by_parameter = trained(target_modules=["linear"], modules_to_save=["table"])
    by_no_name = trained(target_modules=["linear"], modules_to_save=["no_such_name"])
print(f"norm: {by_module}\ntable: {by_parameter}\nno_such_name: {by_no_name}\nwarnings: {[str(w.message) for w in said]}")
assert any("norm" in name for name in by_module)
assert all("lora" in name for name in by_parameter + by_no_name) and not said
try:
    trained(target_modules=["no_such_name"])
except ValueError as error:
    print(f"target_modules: {str(error)[:80]}")
else:
    raise AssertionError("target_modules refused an unknown name")
PY
