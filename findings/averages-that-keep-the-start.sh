#!/usr/bin/env bash
# ema-pytorch 0.8.3, torch 2.13.0: KarrasEMA, the average by powers of the step that PostHocEMA keeps, with
# update_every=100, its default; and EMA.forward_eval.
#
# Expected: an average over steps with weights t**gamma, of the width that sigma_rel says, whether every step is taken
# or each hundredth; and the averaged model's answer in evaluation, as the name has it.
# Seen: the decay of one step is applied at each hundredth, so the average is far wider, silently: after 20000 steps of
# a sigma_rel of 0.1 63% of it are still the weights that training started from. forward_eval drops out.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 ema-pytorch==0.8.3 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import warnings

import torch
from ema_pytorch import EMA
from ema_pytorch.post_hoc_ema import KarrasEMA

warnings.simplefilter("error")
STEPS = 20000
for every in (1, 100):
    model = torch.nn.Linear(2, 1, bias=False).double()
    average = KarrasEMA(model, sigma_rel=0.1, update_every=every)
    with torch.no_grad():
        for step in range(STEPS):
            model.weight[0, 0] = step
            model.weight[0, 1] = float(step == 0)  # how much of it is the start
            average.update()
    mean, start = average.ema_model.weight[0].tolist()
    right = (average.gamma + 1) / (average.gamma + 2) * STEPS
    print(
        f"update_every={every}: {start:.2g} of the average is the start; "
        f"its mean step is {mean:.0f}, should be {right:.0f}"
    )
    assert (abs(mean / right - 1) < 1e-3 and start < 1e-6) if every == 1 else (mean < 0.5 * right and start > 0.6)

torch.manual_seed(0)
averaged = EMA(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5)))
x = torch.randn(4, 8)
with torch.no_grad():
    found, right = averaged.forward_eval(x), averaged.ema_model.eval()(x)
print(f"forward_eval: off by {(found - right).norm() / right.norm():.2g} (relative)")
assert (found - right).norm() / right.norm() > 0.1
PY
