#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0: from_pretrained of float32 weights whose config.json says bfloat16.
#
# Expected: the weights as they are, float32, or a word that they are rounded.
# Seen: they are loaded as bfloat16, so that training goes on in bfloat16; dtype=torch.float32 is needed to have them whole.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import json
import tempfile
import warnings
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    model.save_pretrained(folder)
    file = Path(folder, "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "bfloat16"}))
    by_default = LlamaForCausalLM.from_pretrained(folder)
    asked = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
weight = model.lm_head.weight
lost = (by_default.lm_head.weight.float() - weight).abs().max().item()
print(f"by default {by_default.dtype}, off by {lost:.1e}; asked for {asked.dtype}; warnings: {[str(w.message) for w in said]}")
assert by_default.dtype == torch.bfloat16 and lost > 0 and not said
assert torch.equal(asked.lm_head.weight, weight)
PY
