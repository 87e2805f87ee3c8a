#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0: generation by an LED and by an FSMT, two encoder-decoders, with a static cache.
#
# Expected: the tokens that the default cache gives, as with BART and M2M100, or a refusal.
# Seen: other tokens, without a word. Their decoders make no mask for a single new token, which needs none where a cache
# holds nothing but what was read; in a static cache it attends to the slots not filled yet as well, whose zeros take
# weight. (local-attention-with-a-static-cache.sh is about a decoder whose own masks are cut wrongly.)
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import logging

import torch
import transformers

transformers.logging.disable_default_handler()
said = []
logging.getLogger("transformers").addHandler(logging.Handler())
logging.getLogger("transformers").handlers[-1].emit = lambda record: said.append(record.getMessage())
sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
sizes |= {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": None}
options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
models = {
    "Bart": {"vocab_size": 64},
    "M2M100": {"vocab_size": 64},
    "LED": {"vocab_size": 64, "attention_window": 4},
    "FSMT": {"langs": ["en", "de"], "src_vocab_size": 64, "tgt_vocab_size": 64},
}
for name, own in models.items():
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(
        getattr(transformers, f"{name}Config")(**sizes, **special, **own)
    ).eval()
    for key, parameter in model.named_parameters():
        if parameter.dim() > 1 and "embed_positions" not in key:
            torch.nn.init.normal_(parameter, std=0.4)
    text = torch.randint(3, 64, (4, 16))
    inputs = {"attention_mask": torch.ones_like(text), "return_dict_in_generate": True, "output_logits": True, **options}
    default, without, static = (
        model.generate(text, **inputs, **way)
        for way in ({}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True})
    )
    differ = (static.sequences != default.sequences).sum().item()
    first = ((static.logits[0] - default.logits[0]).norm() / default.logits[0].norm()).item()
    about = [message for message in said if "cache" in message]
    print(f"{name}: first logits off by {first:.2g} (relative), {differ} of 96 greedy tokens differ; said of caches: {about}")
    assert torch.equal(default.sequences, without.sequences) and not about
    assert (first > 0.1 and differ) if name in ("LED", "FSMT") else (first < 1e-4 and not differ)
PY
