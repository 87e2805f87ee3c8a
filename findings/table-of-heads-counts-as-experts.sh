#!/usr/bin/env bash
# peft 0.21.2 (transformers 5.24.0, torch 2.13.0): LoRA of rank r on an nn.Parameter of three dimensions, by
# target_parameters.
#
# Expected: r rows, as the option says, or an option that says what the first dimension is.
# Seen: the first dimension is taken for experts, each of which gets r rows: r times their number in all.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 peft==0.21.2 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from torch import nn


class Tables(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.per_head = nn.Parameter(torch.randn(100, 16)), nn.Parameter(torch.randn(3, 100, 16))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.tables = Tables()

    def forward(self, x):
        return x


def rows(name):
    config = LoraConfig(r=4, target_modules=[], target_parameters=[f"tables.{name}"])
    adapted = get_peft_model(Model(), config).named_parameters()
    return next(parameter.shape[0] for key, parameter in adapted if "lora_A" in key)


found = {name: rows(name) for name in ("one", "per_head")}
print(f"rows of a rank of 4: {found}")
assert found == {"one": 4, "per_head": 12}
PY
