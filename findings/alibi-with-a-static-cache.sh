#!/usr/bin/env bash
# transformers 5.24.0: generation by a Falcon with alibi=True and a static cache.
#
# Expected: the tokens that the default cache gives.
# Seen: a RuntimeError about sizes: the biases are made for the tokens so far, the scores have the whole cache's length.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5 transformers==5.24.0
"$dir/bin/python" - <<'PY'
import torch
import transformers

torch.manual_seed(0)
config = transformers.FalconConfig(
    vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, alibi=True,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
)
model = transformers.FalconForCausalLM(config).eval()
prompt = torch.tensor([[5, 6, 7]])
print("default cache:", model.generate(prompt, max_new_tokens=4, do_sample=False)[0, 3:].tolist())
try:
    model.generate(prompt, max_new_tokens=4, do_sample=False, cache_implementation="static")
except RuntimeError as error:
    print("static cache: ", error)
else:
    raise SystemExit("static cache works now")
PY
