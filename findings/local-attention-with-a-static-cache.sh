#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0: generation by a GPT-Neo with local attention and a static cache.
#
# Expected: the tokens that the default cache gives, or a refusal.
# Seen: other tokens, without a word. The rows of the model's own causal and local masks are chosen by the number of
# keys, which with a static cache is that of the whole buffer: a token may see what the buffer's last ones may. The
# library's mask hides the future as well, so global layers stay right; local ones may see nothing and take the mean of
# all so far. (Falcon's biases, in alibi-with-a-static-cache.sh, meet the same buffer and raise.)
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import torch
from transformers import GPTNeoConfig, GPTNeoForCausalLM, StaticCache

options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
prompt = torch.arange(5, 15)[None]
found = {}
for kind in ("global", "local"):
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=50, hidden_size=32, num_layers=1, num_heads=4, attention_types=[[[kind], 1]], window_size=4,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )
    model = GPTNeoForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    default = model.generate(prompt, **options)[0, 10:].tolist()
    static = model.generate(prompt, cache_implementation="static", **options)[0, 10:].tolist()
    with torch.no_grad():
        cached = model(prompt, cache=StaticCache(config=config, max_cache_len=32)).logits
        found[kind] = default == static, (cached - model(prompt).logits).abs().max().item()
    print(f"{kind} attention\n  default: {default}\n  static:  {static}\n  logits off by {found[kind][1]:.2g}")
assert found["global"][0] and found["global"][1] < 1e-4
assert not found["local"][0] and found["local"][1] > 0.1
PY
