#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.24.0, torch 2.13.0: generation by a prefix-tuned Llama.
#
# Expected: the tokens that a loop gives which calls the tuned model on the whole text each time.
# Seen: by default the tokens of the model without the prefix: the tuning does not count. generate() makes a cache of its
# own, peft hands its prefix over by the old name "past_key_values", and the new name "cache" wins; a FutureWarning
# about the two names is all that is said. With use_cache=False the first token is right and later ones are not. (A
# prompt, in prompt-tuning-with-a-cache.sh, is lost after the first token, and right without a cache.)
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5 transformers==5.24.0 peft==0.21.2
"$dir/bin/python" - <<'PY'
import warnings

import torch
import transformers
from peft import PrefixTuningConfig, get_peft_model

torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    bos_token_id=None, eos_token_id=None, pad_token_id=None,
)
model = transformers.LlamaForCausalLM(config).eval()
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.3)
prompt = torch.randint(3, 67, (2, 6))
options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "do_sample": False}
untuned = model.generate(prompt, **options)[:, 6:]
tuned = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
for parameter in (p for p in tuned.parameters() if p.requires_grad):
    torch.nn.init.normal_(parameter, std=2.0)  # a prefix as it is after some training
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    default = tuned.generate(input_ids=prompt, **options)[:, 6:]
without = tuned.generate(input_ids=prompt, use_cache=False, **options)[:, 6:]
text = prompt
with torch.no_grad():
    for _ in range(6):
        logits = tuned(input_ids=text, attention_mask=torch.ones_like(text)).logits
        text = torch.cat((text, logits[:, -1:].argmax(-1)), dim=1)
print("right:             ", text[:, 6:].tolist())
print("use_cache=False:   ", without.tolist())
print("by default:        ", default.tolist())
print("without the prefix:", untuned.tolist())
print("said:", {f"{w.category.__name__}: {str(w.message)[:70]}..." for w in said})
assert torch.equal(default, untuned) and not torch.equal(default, text[:, 6:])
assert torch.equal(without[:, 0], text[:, 6]) and not torch.equal(without, text[:, 6:])
assert all(w.category is FutureWarning for w in said)
PY
