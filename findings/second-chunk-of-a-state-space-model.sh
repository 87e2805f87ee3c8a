#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0: several tokens at once for a Mamba, Falcon-Mamba or Jamba whose cache is filled, as
# generate(prefill_chunk_size=...) and a second turn of a conversation give them.
#
# Expected: the logits and tokens of the whole text in one run, as Mamba-2 has them, or a refusal.
# Seen: other numbers, silently. The convolution goes on from the cache, the scan starts from a state of zeros unless there
# is a single new token, and then writes its state over the cached one: what was read before is forgotten.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import logging

import torch
import transformers

logging.disable(logging.WARNING)  # that faster kernels are not installed
options = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 48}
experts = {"num_experts": 2, "expert_layer_offset": 1, "attn_layer_period": 2, "attn_layer_offset": 1}
models = {
    "Mamba": {"state_size": 8},
    "FalconMamba": {"state_size": 8},
    "Jamba": {**heads, **experts, "mamba_d_state": 8},
    "Mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1},
}
torch.manual_seed(0)
text, error = torch.randint(3, 64, (1, 24)), {}
for name, own in models.items():
    config = getattr(transformers, f"{name}Config")(**options, **own)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    with torch.no_grad():
        whole = model(text, use_cache=False).logits
        for sizes in ((12,) + 12 * (1,), (12, 12)):
            cache, parts = transformers.DynamicCache(config=config), []
            for part in text.split(sizes, dim=1):
                parts.append(model(part, cache=cache, use_cache=True).logits)
            error[name, sizes[1]] = ((torch.cat(parts, 1) - whole).norm() / whole.norm()).item()
    print(f"{name}: relative error by single tokens {error[name, 1]:.2g}, by twelve {error[name, 12]:.2g}")
    if name == "Jamba":
        greedy = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(text)}
        plain, chunked = (model.generate(text, **greedy, **chunk) for chunk in ({}, {"prefill_chunk_size": 8}))
        differ = (plain != chunked).sum().item()
        print(f"  generate(prefill_chunk_size=8): {differ} of 16 greedy tokens differ")
assert all(error[name, 1] < 1e-4 for name in models) and error["Mamba2", 12] < 1e-4
assert all(error[name, 12] > 0.05 for name in ("Mamba", "FalconMamba", "Jamba")) and differ > 0
PY
