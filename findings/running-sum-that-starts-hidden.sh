#!/usr/bin/env bash
# torch 2.13.0: the gradient of logcumsumexp over numbers of which the first are -inf, as hidden tokens have it that
# come before a text.
#
# Expected: none for what is hidden, as logsumexp has it, and as logcumsumexp has it for -inf after the first number.
# Seen: NaN for each -inf before the first number, silently, though the values are right and only those behind it are
# asked for. With a mask that is added to scores one padded row makes NaN of every weight before it (masked_fill keeps
# it away). (The project's open issue 49724 is about logaddexp and logsumexp.)
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import warnings

import torch

warnings.simplefilter("error")
hidden = -float("inf")


def gradients(numbers):
    """By the last of the running sums, and by the sum itself."""
    for function in (lambda x: x.logcumsumexp(0)[-1], lambda x: x.logsumexp(0)):
        x = torch.tensor(numbers, dtype=torch.float64, requires_grad=True)
        value = function(x)
        yield value.item(), *torch.autograd.grad(value, x)


for numbers in ([1.0, 2.0, 3.0], [1.0, hidden, 3.0], [hidden, 1.0, 3.0], [hidden, hidden, 3.0]):
    (value, running), (right, whole) = gradients(numbers)
    print(f"{numbers}: off by {abs(value - right):.2g}; gradient {running.tolist()}, of logsumexp {whole.tolist()}")
    assert abs(value - right) < 1e-12 and not whole.isnan().any()
    first = [number == hidden for number in numbers].index(False)
    assert running[:first].isnan().all() and torch.allclose(running[first:], whole[first:])

mask = torch.tensor([[1, 1, 1], [0, 1, 1]]).bool()
bias = torch.zeros(2, 3).masked_fill(~mask, hidden)
for way in ("added", "masked_fill"):
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 1)
    scores = layer(torch.randn(2, 3, 4)).squeeze(2)
    scores = scores + bias if way == "added" else scores.masked_fill(~mask, hidden)
    scores.logcumsumexp(1)[mask].sum().backward()
    print(f"two texts, one padded, {way}: gradient of a weight before it {layer.weight.grad.tolist()}")
    assert layer.weight.grad.isnan().all() == (way == "added")
PY
