#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0: a Bamba and a Moshi called token by token with a cache, in a loop of one's own, and
# on the whole text.
#
# Expected: the same logits, as with Llama and Mistral (with a sliding window, too).
# Seen: other numbers, silently. Bamba's rotary positions start again at 0 in every call that is not given position_ids,
# whatever the cache holds (generate() gives them). Moshi's sliding window cuts what the cache keeps, and is no part
# of the mask: without a cache, as in training, every token sees all of the text.
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
heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
states = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "attn_layer_indices": [1]}
models = {
    "Llama": {**heads, "intermediate_size": 48},
    "Mistral": {**heads, "intermediate_size": 48, "sliding_window": 6},
    "Bamba": {**heads, "intermediate_size": 48, **states},
    "Moshi": {**heads, "ffn_dim": 48, "sliding_window": 6},
}
torch.manual_seed(0)
text, found = torch.randint(3, 64, (1, 16)), {}
for name, own in models.items():
    config = getattr(transformers, f"{name}Config")(vocab_size=64, hidden_size=32, num_hidden_layers=2, pad_token_id=0, **own)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)

    def steps(**places):
        cache, parts = transformers.DynamicCache(config=config), []
        for t in range(16):
            place = {key: value[:, t : t + 1] for key, value in places.items()}
            parts.append(model(text[:, t : t + 1], cache=cache, use_cache=True, **place).logits)
        return torch.cat(parts, dim=1)

    with torch.no_grad():
        whole = model(text, use_cache=False).logits
        errors = [((other - whole).norm(dim=-1) / whole.norm(dim=-1))[0] for other in (
            steps(), steps(position_ids=torch.arange(16)[None])
        )]
    found[name] = [error.max().item() for error in errors] + [errors[0][:6].max().item()]
    print("{}: off by {:.2g} (relative), with position_ids by {:.2g}; first 6 tokens by {:.2g}".format(name, *found[name]))
assert all(max(found[name]) < 1e-5 for name in ("Llama", "Mistral"))
assert found["Bamba"][0] > 0.05 and found["Bamba"][1] < 1e-5
assert min(found["Moshi"][:2]) > 0.05 and found["Moshi"][2] < 1e-5
PY
