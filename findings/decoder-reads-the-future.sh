#!/usr/bin/env bash
# x-transformers 2.31.10, torch 2.13.0: a Decoder with attn_orthog_projected_values, attn_orthog_projected_values_per_head,
# orthog_residual or mv_split_residual.
#
# Expected: what a token predicts does not depend on later tokens, as with the Decoder's other options, or a refusal, as
# an option for one direction alone (rotary_xpos) gives in an Encoder.
# Seen: it does, silently. The three projections flatten a text into one long vector and project that, where each token's
# own is meant; mv_split_residual takes the mean of all tokens, later ones too. A language model trains on what it is
# to predict, and generates without it: other tokens with a cache than without.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 x-transformers==2.31.10 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import torch
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

found = {}
for option in (
    None, "gate_residual", "attn_orthog_projected_values", "attn_orthog_projected_values_per_head", "orthog_residual",
    "mv_split_residual",
):
    torch.manual_seed(0)
    layers = Decoder(dim=32, depth=2, heads=4, attn_dim_head=8, **({option: True} if option else {}))
    model = TransformerWrapper(num_tokens=64, max_seq_len=64, attn_layers=layers).eval()
    text = torch.randint(0, 64, (8, 16))
    other = torch.cat((text[:, :12], torch.randint(0, 64, (8, 4))), dim=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        change = (model(other) - model(text))[:, :12].abs().max().item()
    generator = AutoregressiveWrapper(model)
    default, without = (
        generator.generate(text, seq_len=24, temperature=0.0, **cache) for cache in ({}, {"cache_kv": False})
    )
    found[option] = change, (default != without).sum().item()
    print(f"{option}: other later tokens change logits by {change:.2g}; {found[option][1]} of 192 tokens differ with a cache")
assert all(found[option] == (0, 0) for option in (None, "gate_residual"))
assert all(change > 0.01 and differ > 0 for option, (change, differ) in found.items() if option not in (None, "gate_residual"))
PY
