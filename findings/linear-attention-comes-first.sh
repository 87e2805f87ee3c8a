#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0: a MiniMax whose first layer is of linear attention, as MiniMax-Text-01's is, with a
# cache.
#
# Expected: generate() gives a left-padded text the tokens that it has alone, and steps with its cache are the
# whole text's, as they are without a cache, and where the first layer is of full attention.
# Seen: other tokens and other logits, silently. The cache counts the tokens of its first layer, and a linear one keeps
# none there, so masks and positions are those of an empty cache.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import logging

import torch
from transformers import MiniMaxConfig, MiniMaxForCausalLM

logging.disable(logging.WARNING)  # that faster kernels are not installed
torch.manual_seed(0)
text = torch.randint(3, 64, (1, 24))
padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), text], 1)
for order in (["full_attention", "linear_attention"], ["linear_attention", "full_attention"]):
    config = MiniMaxConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_hidden_layers=2, layer_types=order, num_local_experts=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )
    torch.manual_seed(0)
    model = MiniMaxForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)

    def generated(rows, model=model, **options):
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": -1, **options}
        return model.generate(rows, attention_mask=(rows > 0).long(), **options)[:, -12:]

    right = generated(text)
    without = (generated(padded, use_cache=False) != right).sum().item()
    differ = (generated(padded) != right).sum().item()
    with torch.no_grad():
        whole = model(text, use_cache=False).logits
        out = model(text[:, :14], use_cache=True)
        found = [out.logits]
        for token in text[:, 14:].split(1, 1):
            out = model(token, cache=out.past_key_values, use_cache=True)
            found.append(out.logits)
    error = ((torch.cat(found, 1) - whole).norm() / whole.norm()).item()
    print(f"{order[0]} first: of 12 greedy tokens left padding changes {without} without a cache, {differ} with one")
    print(f"{order[0]} first: steps are off by {error:.2g} (relative)")
    assert not without
    assert (differ and error > 0.05) if order[0] == "linear_attention" else (not differ and error < 1e-4)
PY
