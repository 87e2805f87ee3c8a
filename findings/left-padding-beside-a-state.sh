#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0: left padding, as generate() asks for in a batch, of a RecurrentGemma and of a
# DeepSeek-V4.
#
# Expected: at the tokens of a padded row the logits that the text has alone, as with Llama and Mamba.
# Seen: other logits, and other tokens from generate(), silently. The mask hides padding from attention alone:
# RecurrentGemma's recurrence and convolution read it, and DeepSeek-V4's sparse layers compress it with the text into
# keys that no mask hides. (The project's open issue 45938 is about DeepSeek-V4; a skipped test there calls it a limit of
# both. Neither model says so to its user.)
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
heads = {"num_attention_heads": 4, "intermediate_size": 48}
experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_layer_types": ["moe"]}
models = {
    "Llama": {**heads, "num_hidden_layers": 3},
    "Mamba": {"num_hidden_layers": 3, "state_size": 8},
    "RecurrentGemma": {**heads, "num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 32},
    "DeepseekV4": {
        **heads, **experts, "num_hidden_layers": 1, "layer_types": ["compressed_sparse_attention"], "head_dim": 16,
        "qk_rope_head_dim": 8, "q_lora_rank": 16, "o_groups": 2, "o_lora_rank": 8, "index_n_heads": 2, "index_head_dim": 16,
    },
}
torch.manual_seed(0)
rows, found = torch.randint(3, 64, (2, 40)), {}
mask = (torch.arange(40) >= torch.tensor([[8], [0]])).long()  # the first row's text is 32 tokens long
greedy = {"max_new_tokens": 16, "do_sample": False}
for name, own in models.items():
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    config = getattr(transformers, f"{name}Config")(vocab_size=64, hidden_size=32, **special, **own)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    places = {} if name == "Mamba" else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad():
        padded = model(rows, attention_mask=mask, use_cache=False, **places).logits[:1, 8:]
        alone = model(rows[:1, 8:], use_cache=False).logits
    error = ((padded - alone).norm() / alone.norm()).item()
    tokens = model.generate(rows, attention_mask=mask, **greedy)[:1, 40:]
    right = model.generate(rows[:1, 8:], attention_mask=mask[:1, 8:], **greedy)[:, 32:]
    found[name] = error, (tokens != right).sum().item()
    print(f"{name}: logits at real tokens off by {error:.2g} (relative), {found[name][1]} of 16 greedy tokens differ")
assert all(found[name][0] < 1e-5 and not found[name][1] for name in ("Llama", "Mamba"))
assert all(found[name][0] > 0.05 for name in ("RecurrentGemma", "DeepseekV4")) and found["DeepseekV4"][1] > 0
PY
