#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0: a Llama in float64 with left padding and attn_implementation="eager".
#
# Expected: at the tokens of a padded row the logits that the text has alone, as with "sdpa" or in float32.
# Seen: NaN there. Masked scores are float64's lowest number, but the softmax is asked for in float32, where that is
# -inf; a padded position sees none but masked ones and becomes NaN, and from the second layer on 0 * NaN reaches the
# real tokens. Models that take their eager attention from Llama have the same line.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 50}
text = torch.arange(10, 19)[None]
mask = (torch.arange(9) >= 3).long()[None]
place = (mask.cumsum(1) - 1).clamp(min=0)


def error(dtype, implementation, layers):
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=layers, attn_implementation=implementation, **sizes)
    model = LlamaForCausalLM(config).to(dtype).eval()
    with torch.no_grad():
        padded = model(text, attention_mask=mask, position_ids=place).logits[:, 3:]
        return (padded - model(text[:, 3:]).logits).abs().max().item()


assert torch.tensor(torch.finfo(torch.float64).min, dtype=torch.float64).float().isinf()
found = {
    (str(dtype), implementation, f"{layers} layers"): error(dtype, implementation, layers)
    for dtype in (torch.float32, torch.float64)
    for implementation in ("eager", "sdpa")
    for layers in (1, 2)
}
print(*found.items(), sep="\n")
wrong = found.pop(("torch.float64", "eager", "2 layers"))
assert wrong != wrong and all(value < 1e-5 for value in found.values())
PY
