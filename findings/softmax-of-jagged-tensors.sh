#!/usr/bin/env bash
# torch 2.13.0: softmax of a nested tensor with layout=torch.jagged over a dimension that is counted from the front,
# such as the tokens (dim=1) in pooling by attention.
#
# Expected: each text's softmax and, by backward(), its gradient, as with dim=-1, or an error, as log_softmax over the
# tokens gives.
# Seen: the softmax is right, its gradient is another function's, silently: the backward counts the dimension in the
# packed tokens, which have one fewer, so it takes the next one. (Over the last one it ends in an error.)
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import warnings

import torch

warnings.simplefilter("ignore")  # that nested tensors are a prototype
torch.manual_seed(0)
for sizes, dim, right in (
    ((4,), -1, True),
    ((4,), 1, False),
    ((3, 4), -1, True),
    ((3, 4), 1, False),
    ((3, 4), 2, False),
):
    texts = [torch.randn(length, *sizes, dtype=torch.float64) for length in (3, 5, 2)]
    weights = [torch.randn_like(text) for text in texts]
    alone = [text.clone().requires_grad_() for text in texts]
    nested = torch.nested.nested_tensor(texts, layout=torch.jagged, requires_grad=True)
    found, single = nested.softmax(dim).unbind(), [text.softmax(dim if dim < 0 else dim - 1) for text in alone]
    value = max((a - b).abs().max().item() for a, b in zip(found, single, strict=True))
    for parts in (found, single):
        sum((part * weight).sum() for part, weight in zip(parts, weights, strict=True)).backward()
    gradient, expected = torch.cat(nested.grad.unbind()), torch.cat([text.grad for text in alone])
    error = ((gradient - expected).norm() / expected.norm()).item()
    print(
        f"texts of sizes {('tokens', *sizes)}, dim={dim}: softmax off by {value:.2g}, gradient by {error:.2g} (relative)"
    )
    assert value < 1e-12 and ((error < 1e-12) if right else (error > 0.1))
PY
