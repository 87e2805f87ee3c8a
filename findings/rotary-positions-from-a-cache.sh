#!/usr/bin/env bash
# rotary-embedding-torch 0.9.1, torch 2.13.0: get_axial_freqs with offsets, and rotate_queries_with_cached_keys with
# use_xpos=True.
#
# Expected: the positions that are asked for, as with cache_if_possible=False; and for the last query beside all keys the
# scores that it has in a run of the whole text, as with use_xpos=False.
# Seen: other ones, silently. Angles are kept by length alone: the second axis of a square gets the first one's offset,
# later offsets are passed over, and the kept angles serve rotate_queries_or_keys, too, which then starts from the offset.
# xpos centres its scale at half of what it is given, for a cached query its own length instead of the text's: scores
# are off by more the longer the text is.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 rotary-embedding-torch==0.9.1 einops==0.8.2 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import warnings

import torch
from rotary_embedding_torch import RotaryEmbedding

warnings.simplefilter("error")
torch.manual_seed(0)
plain, text = RotaryEmbedding(16, cache_if_possible=False), torch.randn(1, 1, 4, 32)
square = {"offsets": (2, 3)}
right = plain.get_axial_freqs(8, 8)[2:6, 3:7]
assert torch.equal(plain.get_axial_freqs(4, 4, **square), right)


def off(found, right):
    return (found - right).abs().max().item()


first = RotaryEmbedding(16)
found = {
    "a square at (2, 3), angles": off(first.get_axial_freqs(4, 4, **square), right),
    "the next one, at (0, 0)": off(first.get_axial_freqs(4, 4), plain.get_axial_freqs(4, 4)),
    "a text after them": off(first.rotate_queries_or_keys(text), plain.rotate_queries_or_keys(text)),
}
second = RotaryEmbedding(16)
second.get_axial_freqs(8, 8)
found["a square at (2, 3) after one at (0, 0)"] = off(second.get_axial_freqs(4, 4, **square), right)
print(f"off by {found}")
assert min(found.values()) > 0.5

errors = []
for length in (64, 1024):
    q, k = torch.randn(2, 1, 1, length, 32, dtype=torch.float64)
    for xpos in (False, True):
        rotary = RotaryEmbedding(32, use_xpos=xpos).double()
        if xpos:
            whole_q, whole_k = rotary.rotate_queries_and_keys(q, k)
        else:
            whole_q, whole_k = rotary.rotate_queries_or_keys(q), rotary.rotate_queries_or_keys(k)
        cached_q, cached_k = rotary.rotate_queries_with_cached_keys(q[..., -1:, :], k)
        scores, whole = cached_q @ cached_k.mT, whole_q[..., -1:, :] @ whole_k.mT
        errors.append(((scores - whole).norm() / whole.norm()).item())
        print(f"{length} tokens, use_xpos={xpos}: scores of the last query off by {errors[-1]:.2g} (relative)")
assert max(errors[::2]) < 1e-5 and errors[1] > 0.01 and errors[3] > 0.1
PY
