#!/usr/bin/env bash
# peft 0.21.2 (transformers 5.24.0), torch 2.13.0: LoRA on the linear layers of an nn.TransformerEncoderLayer.
#
# Expected: the adapter counts in evaluation as it does in training, as it does once it is merged.
# Seen: in evaluation the model answers as if it had no adapter, and nothing is said. PyTorch's fast path reads
# linear1.weight and linear2.weight, which peft answers with the base weight, and never calls the layers; a fine-tuned
# encoder trains well and is evaluated untrained. Adapters of the attention ("self_attn") are lost in the same way.
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

x = torch.randn(2, 5, 16)
found = {}
for targets in (["linear1", "linear2"], ["self_attn"]):
    torch.manual_seed(0)
    base = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 1)
    with torch.no_grad(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        before = base.eval()(x)
        # adapters as they are after some training, not zero as they start
        model = get_peft_model(base, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
        training, evaluation = model.train()(x), model.eval()(x)
        merged = model.merge_and_unload().eval()(x)
    effect = {
        name: (value - before).abs().max().item()
        for name, value in (("training", training), ("evaluation", evaluation), ("evaluation, merged", merged))
    }
    print(targets, effect, [str(w.message) for w in said])
    assert effect["training"] > 0.1 and effect["evaluation"] < 1e-5 and not said
    assert (merged - training).abs().max() < 1e-4
PY
