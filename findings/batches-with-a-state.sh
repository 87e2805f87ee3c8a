#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0: an RWKV (RwkvForCausalLM) that generates with its state, one text and two at once.
#
# Expected: every row gets the tokens that it gets alone, and that a run over the whole text gives.
# Seen: so it is with one text, and with two as long as several tokens come at once. Steps of one token of a batch mix
# its rows, and so does generate(), silently: the state of B rows, [B, hidden], is added to the tokens' [B, 1, hidden],
# which makes [B, B, hidden].
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import logging

import torch
from transformers import RwkvConfig, RwkvForCausalLM

logging.disable(logging.WARNING)  # that a faster kernel is not installed
torch.manual_seed(0)
config = RwkvConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, bos_token_id=1, eos_token_id=2, pad_token_id=0)
model = RwkvForCausalLM(config).eval()
for parameter in model.parameters():
    if parameter.dim() > 1:
        torch.nn.init.normal_(parameter, std=0.25)
rows = torch.randint(3, 64, (2, 16))


@torch.no_grad()
def steps(rows, cuts):
    found, state = [], None
    for start, end in zip(cuts, cuts[1:], strict=False):
        out = model(rows[:, start:end], state=state, use_cache=True)
        found, state = [*found, out.logits[:, -1]], out.state
    return torch.stack(found, 1)


def generated(rows, **options):
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": -1, **options}
    return model.generate(rows, attention_mask=torch.ones_like(rows), **options)[:, 16:]


with torch.no_grad():
    whole = model(rows, use_cache=False).logits
errors = {}
for name, cuts in {"chunks of two": [8, 10, 12, 14, 16], "chunks of one": list(range(8, 17))}.items():
    for count in (1, 2):
        found = steps(rows[:count], [0, *cuts])[:, 1:]
        right = whole[:count, [cut - 1 for cut in cuts[1:]]]
        errors[name, count] = ((found - right).norm() / right.norm()).item()
        print(f"{count} text(s), {name}: logits off by {errors[name, count]:.2g} (relative)")
wrong = errors.pop(("chunks of one", 2))
assert wrong > 0.1 and max(errors.values()) < 1e-4
alone = torch.cat([generated(row[None]) for row in rows])
assert torch.equal(generated(rows, use_cache=False), alone)
differ = (generated(rows) != alone).sum().item()
print(f"generate() of two texts: {differ} of 24 greedy tokens are not those of each text alone")
assert differ
PY
