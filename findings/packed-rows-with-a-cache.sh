#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0: two documents packed in one row, told apart by position_ids, in evaluation.
#
# Expected: a stock Llama separates the documents whenever position_ids start again at 0, as it does in training, or says
# that it did not; the second document's logits are then those of the document alone.
# Seen: by default (use_cache=True) the model makes an empty cache first, and with a cache the position_ids are not
# searched for documents: the second one reads the first, without a word. With use_cache=False it is exact.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes)).eval()
first, second = torch.randint(0, 64, (1, 9)), torch.randint(0, 64, (1, 7))
packed = torch.cat((first, second), dim=1)
position_ids = torch.cat((torch.arange(9), torch.arange(7)))[None]
with torch.no_grad():
    alone = model(second).logits
    error = {
        use_cache: (model(packed, position_ids=position_ids, **options).logits[:, 9:] - alone).abs().max().item()
        for use_cache, options in (("default", {}), ("use_cache=False", {"use_cache": False}))
    }
print(f"second document, packed against alone (largest logit {alone.abs().max():.2f}): {error}")
assert error["use_cache=False"] < 1e-5, "use_cache=False was exact"
assert error["default"] > 0.05, "the default was wrong"
PY
