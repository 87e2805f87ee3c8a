#!/usr/bin/env bash
# torch 2.13.0, onnxscript 0.7.2, onnx 1.23.2, onnxruntime 1.32.0: torch.onnx.export of operators with some of their
# options.
#
# Expected: the exported program answers what the module answers, or the export fails.
# Seen: other numbers, silently. scatter_reduce("mean") is not a mean; cross_entropy with label_smoothing and
# ignore_index takes the mean of another number of tokens; avg_pool2d's divisor_override does not count; logsigmoid of a
# very negative number is -inf; attention rows whose mask hides every key are not zero.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5 \
  onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
"$dir/bin/python" - <<'PY'
import logging
import warnings

import onnxruntime
import torch
import torch.nn.functional as F
from torch import nn

warnings.simplefilter("ignore")
logging.disable(logging.ERROR)


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


def difference(function, *values):
    module = Call(function)
    program = torch.onnx.export(module, values, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    feeds = {i.name: value.numpy() for i, value in zip(session.get_inputs(), values, strict=True)}
    return (torch.from_numpy(session.run(None, feeds)[0]) - module(*values)).abs().max().item()


torch.manual_seed(0)
x, index = torch.randn(6, 5), torch.tensor([[0] * 5, [1] * 5, [0] * 5, [1] * 5, [0] * 5, [2] * 5])
labels, picture = torch.tensor([0, 2, 1, 2, 3, 4]), torch.randn(1, 2, 6, 6)
q, mask = torch.randn(1, 2, 6, 8), torch.ones(6, 6, dtype=torch.bool).tril(-1)
cases = {
    "scatter_reduce sum": (lambda x, i: x.scatter_reduce(0, i, x + 1, "sum"), x, index),
    "scatter_reduce mean": (lambda x, i: x.scatter_reduce(0, i, x + 1, "mean"), x, index),
    "cross_entropy, ignore_index": (lambda x, y: F.cross_entropy(x, y, ignore_index=2), x, labels),
    "cross_entropy, both": (lambda x, y: F.cross_entropy(x, y, ignore_index=2, label_smoothing=0.1), x, labels),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 3), picture),
    "avg_pool2d, divisor_override": (lambda x: F.avg_pool2d(x, 3, divisor_override=2), picture),
    "logsigmoid": (lambda x: F.logsigmoid(x), x),
    "logsigmoid of -200": (lambda x: F.logsigmoid(x), x - 200),
    "attention": (lambda q, m: F.scaled_dot_product_attention(q, q, q, m), q, mask | torch.eye(6, dtype=torch.bool)),
    "attention, hidden row": (lambda q, m: F.scaled_dot_product_attention(q, q, q, m), q, mask),
}
found = {name: difference(*case) for name, case in cases.items()}
print(*(f"{name}: off by {value:.2g}" for name, value in found.items()), sep="\n")
assert all(value < 1e-5 for value in list(found.values())[::2])
assert all(value > 1e-2 for value in list(found.values())[1::2])
PY
