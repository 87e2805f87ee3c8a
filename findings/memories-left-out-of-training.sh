#!/usr/bin/env bash
# recurrent-memory-transformer-pytorch 0.7.0, torch 2.13.0: RecurrentMemoryTransformerWrapper on a text of several
# segments, with use_xl_memories=True, its default.
#
# Expected: each segment attends to the memories of the one before, as in generate() and in the model called segment by
# segment; memory_replay_backprop=True gives the loss and the gradients of backward(); labels count.
# Seen: the wrapper's forward hands the memories to nobody, silently: it trains and scores another model than it
# generates with, and with replay (which hands them over) loss and gradients are others. Without the memories all is the
# same. labels=... are passed over, those that say "ignore", too.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 recurrent-memory-transformer-pytorch==0.7.0 \
  packaging==26.4 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import random
import warnings

import torch

warnings.simplefilter("ignore")  # of the packages that it imports
from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer, RecurrentMemoryTransformerWrapper

sizes = {"num_tokens": 32, "num_memory_tokens": 3, "dim": 32, "depth": 2, "seq_len": 8, "dim_head": 8, "heads": 4}
torch.manual_seed(0)
text = torch.randint(0, 32, (2, 25))


def off(found, right):
    return ((found - right).norm() / right.norm()).item()


for xl in (False, True):
    gradients = []
    for replay in (False, True):
        random.seed(0)  # chooses among streams
        torch.manual_seed(0)
        model = RecurrentMemoryTransformer(**sizes, use_xl_memories=xl).double()
        wrapper = RecurrentMemoryTransformerWrapper(model)
        if replay:
            wrapper(text, memory_replay_backprop=True)
        else:
            loss = wrapper(text, return_loss=True)[0]
            loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    with torch.no_grad():
        memories, xl_memories, parts = None, None, []
        for part in text[:, :-1].split(8, dim=1):
            logits, memories, xl_memories = model(part, memories, xl_memories=xl_memories)
            parts.append(logits)
        by_hand = torch.cat(parts, dim=1)
        whole = wrapper(text[:, :-1])[0]
        labels = torch.full_like(text, -1)  # nothing to learn
        with_labels = wrapper(text, return_loss=True, labels=labels)[0]
    found = off(whole, by_hand), off(gradients[1], gradients[0])
    print(f"use_xl_memories={xl}: logits off by {found[0]:.2g}, gradients by replay by {found[1]:.2g} (relative)")
    assert (min(found) > 0.01) if xl else (max(found) < 1e-10)
    assert torch.equal(with_labels, loss.detach())
print(f"loss: {loss:.4f}, with labels that are all to be ignored: {with_labels:.4f}")
PY
