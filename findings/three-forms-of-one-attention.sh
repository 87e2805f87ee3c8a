#!/usr/bin/env bash
# memory-efficient-attention-pytorch 0.1.6, torch 2.13.0: Attention, the same with memory_efficient=True, and
# FlashAttention, with the same weights.
#
# Expected: one function, computed in three ways, as it is of a text with itself; dropout in training.
# Seen: three functions, silently. Causal attention to a context longer than the queries lines up their ends in the
# plain form, their beginnings in the memory-efficient one, and shifts the other way in FlashAttention, whose first
# queries see nothing. dropout is passed over by the plain form; the memory-efficient one drops from the sum that is
# divided by, too, so its mean over many draws is not the answer of evaluation.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 memory-efficient-attention-pytorch==0.1.6 \
  numpy==2.3.5
"$dir/bin/python" - <<'PY'
import warnings

import torch

warnings.simplefilter("ignore")  # of gradient checkpointing
from memory_efficient_attention_pytorch import Attention, FlashAttention

torch.manual_seed(0)
plain = Attention(dim=32, heads=2, dim_head=16, causal=True, dropout=0.5)
flash = FlashAttention(dim=32, heads=2, dim_head=16, causal=True)
flash.load_state_dict(plain.state_dict())
text, context = torch.randn(2, 6, 32), torch.randn(2, 10, 32)


def off(found, right):
    return ((found - right).norm() / right.norm()).item()


for name, other in {"the text": text, "a longer context": context}.items():
    with torch.no_grad():
        forms = [
            plain.eval()(text, context=other),
            plain(text, context=other, memory_efficient=True),
            flash(text, context=other),
        ]
    pairs = {(i, j): off(forms[i], forms[j]) for i, j in ((0, 1), (0, 2), (1, 2))}
    print(
        f"causal attention to {name}: pairs of forms differ by", ", ".join(f"{value:.2g}" for value in pairs.values())
    )
    assert (max(pairs.values()) < 1e-5) if other is text else (min(pairs.values()) > 0.1)
with torch.no_grad():
    right = plain.eval()(text)
    plain.train()
    once = off(plain(text), right)
    mean = off(sum(plain(text, memory_efficient=True) for _ in range(2000)) / 2000, right)
print(
    f"dropout of 0.5 changes the plain form by {once:.2g}, the mean of 2000 memory-efficient ones by {mean:.2g} (relative)"
)
assert once == 0 and mean > 0.2
PY
