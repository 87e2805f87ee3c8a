#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.24.0: generation by a prompt-tuned Llama, with a cache.
#
# Expected: the tokens that generation without a cache gives, as for any deterministic decoding.
# Seen: other tokens, without a warning. From its second token on generate() with a cache gives tokens that differ from
# those of use_cache=False, which agree with a loop that calls the model on the whole text each time. transformers 5.24
# calls the cache "cache" where earlier releases, and peft, say "past_key_values".
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5 transformers==5.24.0 peft==0.21.2
"$dir/bin/python" - <<'PY'
import torch
import transformers
from peft import PromptTuningConfig, get_peft_model

torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    bos_token_id=None, eos_token_id=None, pad_token_id=None,
)
model = transformers.LlamaForCausalLM(config).eval()
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.3)
tuned = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
prompt = torch.randint(3, 67, (2, 6))
options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "do_sample": False}
found = {use: tuned.generate(input_ids=prompt, use_cache=use, **options)[:, 6:] for use in (True, False)}
text = prompt
with torch.no_grad():
    for _ in range(6):
        logits = tuned(input_ids=text, attention_mask=torch.ones_like(text)).logits
        text = torch.cat((text, logits[:, -1:].argmax(-1)), dim=1)
print("right:          ", text[:, 6:].tolist())
print("without a cache:", found[False].tolist())
print("with a cache:   ", found[True].tolist())
assert torch.equal(found[False], text[:, 6:])
assert not torch.equal(found[True], text[:, 6:])
PY
