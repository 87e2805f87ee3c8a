#!/usr/bin/env bash
# torch 2.13.0: nn.TransformerEncoder with a float mask of finite numbers (a bias by distance, as ALiBi has it).
#
# Expected: the mask is added to the scores, as the documentation says of float masks, in training and in evaluation.
# Seen: in evaluation the fast path takes every number but 0 for "hidden": with a bias by distance each token sees
# itself alone, and a mask without zeros gives NaN. In training, and with gradients on, the answer is right.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import warnings

import torch
from torch import nn

torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
x = torch.randn(2, 6, 16)
place = torch.arange(6.0)
distance = -0.5 * (place[:, None] - place).abs()
with torch.no_grad(), warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    right = model.train()(x, mask=distance)
    evaluation = model.eval()(x, mask=distance)
    alone = model.train()(x, mask=torch.full((6, 6), float("-inf")).fill_diagonal_(0))
    without_zeros = model.eval()(x, mask=distance - 1)  # the same softmax
with_gradients = model(x, mask=distance).detach()
print(f"evaluation against training: {(evaluation - right).abs().max():.2g}")
print(f"evaluation against a mask that leaves each token alone: {(evaluation - alone).abs().max():.2g}")
print(f"evaluation, a mask without zeros: {without_zeros[0, 0, :3].tolist()}")
print(f"evaluation with gradients against training: {(with_gradients - right).abs().max():.2g}")
print(f"warnings: {[str(w.message) for w in said]}")
assert (evaluation - right).abs().max() > 0.1 and (evaluation - alone).abs().max() < 1e-5
assert not said and without_zeros.isnan().all() and (with_gradients - right).abs().max() < 1e-5
PY
