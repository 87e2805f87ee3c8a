#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0: FSMT called with input_ids and decoder_input_ids, as one scores translations.
#
# Expected: each answer depends on the tokens up to its own, as of BART, Marian and T5, and as FSMT's with labels.
# Seen: every answer reads all decoder tokens, silently. There is a causal mask without use_cache alone, and use_cache
# is the default where there are no labels. (The project's issue 21719 is about its defaults, too.)
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import logging

import torch
import transformers

logging.disable(logging.WARNING)
sizes = {"d_model": 32}
for part in ("encoder", "decoder"):
    sizes |= {f"{part}_layers": 2, f"{part}_attention_heads": 4, f"{part}_ffn_dim": 48}
models = {
    "BartForConditionalGeneration": {**sizes, "vocab_size": 64},
    "MarianMTModel": {**sizes, "vocab_size": 64, "pad_token_id": 1, "decoder_start_token_id": 2},
    "T5ForConditionalGeneration": {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2},
    "FSMTForConditionalGeneration": {**sizes, "src_vocab_size": 64, "tgt_vocab_size": 64},
}
for name, own in models.items():
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**own)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    source, target = torch.randint(3, 64, (2, 12)), torch.randint(3, 64, (2, 10))
    found = []
    with torch.no_grad():
        for options in ({}, {"use_cache": False}):
            whole = model(input_ids=source, decoder_input_ids=target, **options).logits[:, :6]
            start = model(input_ids=source, decoder_input_ids=target[:, :6], **options).logits
            found.append(((start - whole).norm() / whole.norm()).item())
    print(f"{name}: later tokens change answers by {found[0]:.2g} (relative), by {found[1]:.2g} with use_cache=False")
    assert found[1] < 1e-5 and (found[0] > 0.05 if "FSMT" in name else found[0] < 1e-5)
PY
