#!/usr/bin/env bash
# minGRU-pytorch 0.2.1, torch 2.13.0: a minLSTM that goes on from the state that an earlier call returned, and the mix
# of minGRUAttnHybrid.
#
# Expected: a text in two parts answers as in one, as a minGRU's does and as single tokens do; and with
# learned_mix=False the average of the recurrent and the attention branch, as its comment has it.
# Seen: other numbers, silently. With several tokens the LSTM takes the state for what is to become one: 0.5 is added to
# it. The hybrid multiplies its attention branch by the mix and by its complement, so it has a quarter of one and half
# of the other, and a learned mix near 0 or 1 leaves no attention at all.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 minGRU-pytorch==0.2.1 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import warnings

import torch

warnings.simplefilter("error")
from minGRU_pytorch import minGRU
from minGRU_pytorch.hybrid import minGRUAttnHybrid
from minGRU_pytorch.minLSTM import minLSTM


def off(found, right):
    return ((found - right).norm() / right.norm()).item()


torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
text = torch.randn(2, 12, 16)
for kind in (minGRU, minLSTM):
    layer, found = kind(16), {}
    with torch.no_grad():
        whole = layer(text)
        for size in (1, 6):
            state, parts = None, []
            for part in text.split(size, dim=1):
                answer, state = layer(part, state, return_next_prev_hidden=True)
                parts.append(answer)
            found[size] = off(torch.cat(parts, dim=1), whole)
    print(f"{kind.__name__}: single tokens off by {found[1]:.2g}, two halves by {found[6]:.2g} (relative)")
    assert found[1] < 1e-10 and ((found[6] < 1e-10) if kind is minGRU else (found[6] > 0.02))

layer = minGRUAttnHybrid(16, dim_head=8, heads=2, learned_mix=False)
branches = {}
layer.rnn_out_norm.register_forward_hook(lambda module, inputs, out: branches.update(recurrent=out))
layer.attn_out_norm.register_forward_hook(lambda module, inputs, out: branches.update(attention=out))
layer.to_out.register_forward_hook(lambda module, inputs, out: branches.update(mixed=inputs[0]))
with torch.no_grad():
    layer(text)
recurrent, attention = (branches[name].transpose(1, 2).flatten(2) for name in ("recurrent", "attention"))
average, seen = 0.5 * recurrent + 0.5 * attention, 0.5 * recurrent + 0.25 * attention
print(
    f"hybrid: off by {off(branches['mixed'], average):.2g} from the average, by {off(branches['mixed'], seen):.2g} from 1/2 and 1/4"
)
assert off(branches["mixed"], average) > 0.1 and off(branches["mixed"], seen) < 1e-10
PY
