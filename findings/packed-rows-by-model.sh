#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0: two documents packed in one row, told apart by position_ids that start again at 0,
# with use_cache=False (what is different with a cache is in packed-rows-with-a-cache.sh).
#
# Expected: the second document's logits are those of the document alone, as with Llama, Mistral or GPT-2, or a model that
# does not separate documents says so.
# Seen: GPT-OSS, AFMoE and OPT take the position_ids for positions, do not hand them to the function that makes the
# mask, and the second document reads the first, silently. Qwen3-Next separates them in attention and carries the state of
# its linear layers over. (An open pull request, 39997, is about GPT-OSS.)
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
heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}
experts = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
models = {
    "Llama": heads,
    "Mistral": heads,
    "GPT2": {"n_head": 4},
    "GptOss": {**heads, **experts},
    "Afmoe": {**heads, **experts},
    "OPT": {"num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "Qwen3Next": {**heads, **experts, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
}
torch.manual_seed(0)
row, found = torch.randint(3, 64, (1, 20)), {}
place = torch.cat((torch.arange(12), torch.arange(8)))[None]
special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
for name, own in models.items():
    config = getattr(transformers, f"{name}Config")(vocab_size=64, hidden_size=32, num_hidden_layers=4, **special, **own)
    names = {"GPT2": "GPT2LMHeadModel"}
    model = getattr(transformers, names.get(name, f"{name}ForCausalLM"))(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    with torch.no_grad():
        packed = model(row, position_ids=place, use_cache=False).logits[:, 12:]
        alone = model(row[:, 12:], use_cache=False).logits
    found[name] = ((packed - alone).norm() / alone.norm()).item()
    print(f"{name}: second document, packed against alone, off by {found[name]:.2g} (relative)")
assert all(found[name] < 1e-5 for name in ("Llama", "Mistral", "GPT2"))
assert all(found[name] > 0.05 for name in ("GptOss", "Afmoe", "OPT", "Qwen3Next"))
PY
