#!/usr/bin/env bash
# linear-attention-transformer 0.19.1, torch 2.13.0: ff_glu, ff_dropout and pkm_num_keys, and shift_tokens beside a
# mask.
#
# Expected: gates and dropout in the feedforward layers and a memory of as many keys, as the options say; with
# input_mask a text's answers whatever stands in the padding, as without shift_tokens.
# Seen: the options are taken and passed over: the layers have neither gates nor dropout, the memory has its default
# size. The shift looks for its mask by another name, so the last token reads the first one of the padding. All
# silently.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 linear-attention-transformer==0.19.1 \
  numpy==2.3.5
"$dir/bin/python" - <<'PY'
import warnings

import torch

warnings.simplefilter("ignore")  # of the packages that it imports
from linear_attention_transformer import LinearAttentionTransformerLM


def model(**options):
    torch.manual_seed(0)
    sizes = {"num_tokens": 32, "dim": 32, "heads": 4, "depth": 2, "max_seq_len": 64, "dim_head": 8}
    return LinearAttentionTransformerLM(**sizes, local_attn_window_size=8, **options)


def size(**options):
    return sum(p.numel() for p in model(**options).parameters())


torch.manual_seed(0)
text = torch.randint(0, 32, (2, 32))
plain, gated, dropping = model(), model(ff_glu=True), model(ff_dropout=0.9).train()
print(
    f"parameters: {size()}, with ff_glu {size(ff_glu=True)}; a memory of 128 keys {size(pkm_layers=(1,))}, of 16",
    end=" ",
)
print(size(pkm_layers=(1,), pkm_num_keys=16))
assert size() == size(ff_glu=True) and size(pkm_layers=(1,)) == size(pkm_layers=(1,), pkm_num_keys=16)
with torch.no_grad():
    dropped = (dropping(text) - plain.eval()(text)).abs().max().item()
    print(f"ff_dropout=0.9 changes training by {dropped:.2g}")
    assert dropped == 0
    mask = (torch.arange(32) < 16).expand(2, 32)
    other = torch.where(mask, text, (text + 1) % 32)
    for shift in (False, True):
        shifting = model(shift_tokens=shift).eval()
        answers, others = (shifting(tokens, input_mask=mask)[:, :16] for tokens in (text, other))
        change = ((others - answers).norm() / answers.norm()).item()
        print(f"shift_tokens={shift}: other padding changes answers by {change:.2g} (relative)")
        assert (change > 5e-3) if shift else (change < 1e-5)
PY
