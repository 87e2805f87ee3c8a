#!/usr/bin/env bash
# reformer-pytorch 1.4.4, torch 2.13.0: ReformerLM with its default positions, which are rotations in each layer, and
# full attention: use_full_attn=True, or a text that full_attn_thres sends there; and its post_attn_dropout.
#
# Expected: positions count, as with absolute_position_emb=True: other orders of the same tokens give other answers;
# dropout in training.
# Seen: full attention takes no rotations and says nothing: the model is blind to the order of its tokens, and one
# trained on long texts by hashed attention, which rotates, answers short ones without positions. post_attn_dropout is
# passed over.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 reformer-pytorch==1.4.4 packaging==26.4 \
  numpy==2.3.5
"$dir/bin/python" - <<'PY'
import warnings

import torch

warnings.simplefilter("ignore")  # of the packages that it imports
from reformer_pytorch import ReformerLM


def off(found, right):
    return ((found - right).norm() / right.norm()).item()


sizes = {
    "num_tokens": 64,
    "dim": 32,
    "depth": 2,
    "max_seq_len": 64,
    "heads": 4,
    "dim_head": 8,
    "bucket_size": 8,
    "ff_chunks": 1,
}
torch.manual_seed(0)
text, order = torch.randint(0, 64, (2, 16)), torch.randperm(16)
for name, options in {
    "hashed": {},
    "full": {"use_full_attn": True},
    "short, full_attn_thres=32": {"full_attn_thres": 32},
    "full, absolute positions": {"use_full_attn": True, "absolute_position_emb": True},
}.items():
    torch.manual_seed(0)
    model = ReformerLM(**sizes, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        torch.manual_seed(1)  # of the hashes
        answers = model(text)
        torch.manual_seed(1)
        change = off(model(text[:, order]), answers[:, order])
    print(f"{name}: another order of the tokens changes their answers by {change:.2g} (relative)")
    assert (change < 1e-5) if name.startswith(("full", "short")) and "absolute" not in name else (change > 0.1)

torch.manual_seed(0)
model = ReformerLM(**sizes, use_full_attn=True, post_attn_dropout=0.9)
dropped = off(model.train()(text), model.eval()(text))
print(f"post_attn_dropout=0.9 changes training by {dropped:.2g}")
assert dropped < 1e-6
PY
