#!/usr/bin/env bash
# torch 2.13.0: torch.utils.flop_counter.FlopCounterMode on a CPU.
#
# Expected: the FLOPs of the matrix products, as its formulas have them for the attention kernels of GPUs and for
# attention written out; or a word on operators that it has no formula for.
# Seen: scaled_dot_product_attention counts as nothing on a CPU, forward and backward, whether causal, masked or with
# grouped heads; so a transformer counts as its linear layers. In evaluation nn.MultiheadAttention and
# nn.TransformerEncoder count as nothing at all, as nn.LSTM does in every mode. (The project's issue 195460 is about
# attention alone, and closed; this release has it still. In torch 2.15.0 scaled_dot_product_attention counts, and its
# backward as 2.5 times the forward, as on GPUs; the rest is as here.)
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import warnings

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

warnings.simplefilter("error")
q = torch.randn(2, 4, 64, 16, requires_grad=True)
x = torch.randn(2, 64, 64)
products = 2 * 2 * (2 * 4 * 64 * 64 * 16)  # queries by keys and weights by values


def flops(function, *values, **options):
    with FlopCounterMode(display=False) as counter:
        out = function(*values, **options)
        if out.requires_grad:
            out.sum().backward()
    return counter.get_total_flops()


with sdpa_kernel(SDPBackend.MATH):
    written_out = flops(scaled_dot_product_attention, q, q, q)
grouped = q[:, ::2].detach()
found = {
    "attention": flops(scaled_dot_product_attention, q, q, q),
    "causal": flops(scaled_dot_product_attention, q, q, q, is_causal=True),
    "grouped": flops(scaled_dot_product_attention, q.detach(), grouped, grouped, enable_gqa=True),
}
layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
attention, recurrent = nn.MultiheadAttention(64, 4, batch_first=True), nn.LSTM(64, 64, batch_first=True)
linear = 2 * x[..., 0].numel() * sum(p.numel() for p in layer.parameters() if p.dim() == 2)
with torch.no_grad():
    training = flops(encoder.train(), x)
    found["encoder, evaluation"] = flops(encoder.eval(), x)
    found["multi-head attention, evaluation"] = flops(lambda x: attention.eval()(x, x, x, need_weights=False)[0], x)
    found["LSTM"] = flops(lambda x: recurrent(x)[0], x)
print(f"attention: {3 * products} with its backward, {written_out} counted where it is written out")
print(f"encoder, training: {training} counted, {linear} are those of its linear layers, {linear + products} right")
print(f"counted elsewhere: {found}")
assert written_out == 3 * products and training == linear and not any(found.values())
PY
