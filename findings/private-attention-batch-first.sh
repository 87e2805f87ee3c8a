#!/usr/bin/env bash
# opacus 1.6.0, torch 2.13.0: DPMultiheadAttention with batch_first=True, which ModuleValidator.fix puts in the place of
# nn.MultiheadAttention with its weights.
#
# Expected: nn.MultiheadAttention's answers, as with batch_first=False; position t of the answer is about query t alone.
# Seen: other numbers, silently: the heads' answers are not brought back beside one another before they are read as
# positions, so position 0 answers for the other queries, too. A square mask is refused unless the batch has its size.
# (The project's pull request 825 describes it; this release, the newest, has it still.)
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 opacus==1.6.0 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import warnings

import torch
from opacus.validators import ModuleValidator
from torch import nn

warnings.simplefilter("ignore")
torch.manual_seed(0)
x, other = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
query = torch.cat((x[:, :1], other[:, 1:]), dim=1)  # the first query is the same
for batch_first in (False, True):
    plain = nn.MultiheadAttention(8, 2, batch_first=batch_first)
    private = ModuleValidator.fix(plain)
    order = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))

    def answer(module, query):
        return order(module(order(query), order(x), order(x))[0])

    with torch.no_grad():
        apart = (answer(plain, x) - answer(private, x)).abs().max().item()
        first = (answer(private, x) - answer(private, query))[:, 0].abs().max().item()
    print(f"batch_first={batch_first}: off by {apart:.2g}; other later queries change the first answer by {first:.2g}")
    assert (apart > 0.1 and first > 0.1) if batch_first else (apart < 1e-6 and first < 1e-6)
PY
