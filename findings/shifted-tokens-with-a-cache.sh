#!/usr/bin/env bash
# x-transformers 2.31.10, torch 2.13.0: generation by a decoder with shift_tokens or with data-dependent ALiBi, by
# default with a cache.
#
# Expected: the tokens that cache_kv=False gives, or no cache, as for other options (can_cache_kv says so of memory
# tokens).
# Seen: other tokens, without a word. With a cache the layers see the newest token alone, so nothing is there to shift
# in from the one before, and the decay between tokens, a running sum over the text, starts anew.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 x-transformers==2.31.10 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import torch
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

found = {}
for options in ({}, {"alibi_pos_bias": True}, {"shift_tokens": 1}, {"attn_data_dependent_alibi": True}):
    torch.manual_seed(0)
    layers = Decoder(dim=32, depth=2, heads=4, attn_dim_head=8, **options)
    model = TransformerWrapper(num_tokens=64, max_seq_len=64, attn_layers=layers).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    prompt = torch.randint(0, 64, (4, 8))
    generator = AutoregressiveWrapper(model)
    default, without = (
        generator.generate(prompt, seq_len=24, temperature=0.0, **cache) for cache in ({}, {"cache_kv": False})
    )
    name = "plain" if not options else next(iter(options))
    found[name] = (default != without).sum().item()
    print(f"{name}: {found[name]} of {default.numel()} greedy tokens differ, can_cache_kv={model.can_cache_kv}")
    assert model.can_cache_kv
assert found["plain"] == found["alibi_pos_bias"] == 0
assert found["shift_tokens"] > 10 and found["attn_data_dependent_alibi"] > 2
PY
