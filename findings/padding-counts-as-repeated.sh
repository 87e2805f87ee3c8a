#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0: generation from padded prompts with encoder_repetition_penalty, which favours what
# the prompt has, where padding is the token that ends a text, as tokenizer.pad_token = tokenizer.eos_token has it.
#
# Expected: a prompt's tokens are those that it has alone, as without the penalty and as with repetition_penalty:
# attention_mask says what is padding.
# Seen: padding counts as a token of the prompt, silently: the end of the text is favoured in padded rows, which are cut
# short.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import warnings

import torch
from transformers import LlamaConfig, LlamaForCausalLM

warnings.simplefilter("ignore")
torch.manual_seed(0)
END = 2
sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes, pad_token_id=END, eos_token_id=END, bos_token_id=1)).eval()
for parameter in model.parameters():
    if parameter.dim() > 1:
        torch.nn.init.normal_(parameter, std=0.3)
prompts = torch.randint(3, 16, (100, 4))
padded, mask = torch.nn.functional.pad(prompts, (5, 0), value=END), (torch.arange(9) >= 5).long().expand(100, 9)
for options in ({}, {"repetition_penalty": 1.5}, {"encoder_repetition_penalty": 1.5}):
    settings = {
        "max_new_tokens": 16,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
        **options,
    }
    alone = model.generate(prompts, attention_mask=torch.ones_like(prompts), **settings)
    beside = model.generate(padded, attention_mask=mask, **settings)
    texts = [
        [row[: (row == END).nonzero()[0]].tolist() if END in row else row.tolist() for row in rows]
        for rows in (alone.sequences[:, 4:], beside.sequences[:, 9:])
    ]
    differ = [(len(a), len(b)) for a, b in zip(*texts, strict=True) if a != b]
    logits = (alone.logits[0] - beside.logits[0]).abs().max().item()
    print(
        f"{options}: first logits differ by {logits:.2g}, {len(differ)} of 100 texts; tokens alone and padded: {differ[:6]}"
    )
    assert logits < 1e-4
    if "encoder_repetition_penalty" in options:
        assert len(differ) > 5 and all(beside < alone for alone, beside in differ)
    else:
        assert not differ
PY
