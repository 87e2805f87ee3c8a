#!/usr/bin/env bash
# transformers 5.24.0: a CLIP text model whose config says is_causal=False.
#
# Expected: the same function whichever attention implementation is chosen: either the flag counts or it does not.
# Seen: with "eager" the first token's state depends on the last token (bidirectional), with "sdpa" it does not (causal).
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5 transformers==5.24.0
"$dir/bin/python" - <<'PY'
import torch
import transformers

change = {}
for implementation in ("eager", "sdpa"):
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=1, eos_token_id=2, is_causal=False, attn_implementation=implementation,
    )
    model = transformers.CLIPTextModel(config).eval()
    tokens = torch.randint(4, 60, (1, 9))
    other = tokens.clone()
    other[:, -1] += 1
    with torch.no_grad():
        difference = model(tokens).last_hidden_state - model(other).last_hidden_state
    change[implementation] = difference[:, 0].abs().max().item()
    print(f"{implementation}: another last token changes the first token's state by {change[implementation]:.3g}")
assert change["eager"] > 1e-4
assert change["sdpa"] == 0
PY
