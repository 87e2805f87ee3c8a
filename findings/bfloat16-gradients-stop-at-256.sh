#!/usr/bin/env bash
# torch 2.13.0, on a CPU: gradients in bfloat16 of what many tokens share: a row of an embedding, a row taken by an
# index, a LayerNorm's weight and bias.
#
# Expected: the sum over the tokens, rounded once, as index_select, a linear layer's bias, an RMSNorm's weight,
# index_add and scatter_add have it.
# Seen: these sum in bfloat16 itself, token by token: a sum of ones stops at 256 (2048 in float16), silently, however
# many tokens there are, so frequent tokens learn least. index_put(accumulate=True), segment_reduce and
# index_reduce("mean") do the same: the mean of 4000 ones is 0.064.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import warnings

import torch
import torch.nn.functional as F

warnings.simplefilter("error")
warnings.filterwarnings("ignore", message="index_reduce")
torch.set_num_threads(1)  # a LayerNorm has a sum for each
TOKENS = 4000
index = torch.zeros(TOKENS, dtype=torch.long)
signs = torch.tensor([1.0, -1.0]).repeat(TOKENS, 2)  # layer_norm leaves them as they are, but for its eps


def gradient(function, *sizes):
    weight = torch.ones(sizes, dtype=torch.bfloat16, requires_grad=True)
    function(weight).float().sum(0).flatten()[0].backward()
    return weight.grad.flatten()[0].item() / TOKENS


def sums(operator, *arguments):
    ones = torch.ones(TOKENS, 4, dtype=torch.bfloat16)
    return operator(torch.zeros(3, 4, dtype=torch.bfloat16), *arguments, ones)[0, 0].item() / TOKENS


x, ones = signs.bfloat16(), torch.ones(TOKENS, 4, dtype=torch.bfloat16)
identity = torch.eye(4, dtype=torch.bfloat16)
right = {
    "index_select": gradient(lambda w: w.index_select(0, index), 3, 4),
    "linear, bias": gradient(lambda b: F.linear(x, identity, b), 4),
    "RMSNorm, weight": gradient(lambda w: F.rms_norm(x, (4,), w), 4),
    "index_add": sums(lambda out, ones: out.index_add(0, index, ones)),
    "scatter_add": sums(lambda out, ones: out.scatter_add(0, index[:, None].expand(-1, 4), ones)),
}
wrong = {
    "embedding": gradient(lambda w: F.embedding(index, w), 3, 4),
    "w[index]": gradient(lambda w: w[index], 3, 4),
    "LayerNorm, weight": gradient(lambda w: F.layer_norm(x, (4,), w), 4),
    "LayerNorm, bias": gradient(lambda b: F.layer_norm(x, (4,), None, b), 4),
    "index_put": sums(lambda out, ones: out.index_put((index,), ones, accumulate=True)),
    "segment_reduce": torch.segment_reduce(ones, "sum", lengths=torch.tensor([TOKENS]))[0, 0].item() / TOKENS,
    "index_reduce, mean": sums(lambda out, ones: TOKENS * out.index_reduce(0, index, ones, "mean", include_self=False)),
}
for name, found in {**right, **wrong}.items():
    print(f"{name}: {found:.3g} of the right sum")
assert all(abs(found - 1) < 0.01 for found in right.values())
assert all(abs(found - 256 / TOKENS) < 1e-3 for found in wrong.values())
PY
