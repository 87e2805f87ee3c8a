#!/usr/bin/env bash
# torch 2.13.0: torch.ao.quantization.quantize_dynamic on a model whose linear layers are a subclass of nn.Linear.
#
# Expected: with {nn.Linear} the layers that are nn.Linear are quantised, as torchao's quantize_ and isinstance have it, or
# a word on those that are left.
# Seen: classes are compared exactly. Every layer of the subclass stays in float32, the model has its old size and answers
# its old values, and nothing says that nothing was quantised; the documentation of qconfig_spec speaks of "submodule types".
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import warnings

import torch
from torch import nn


class ScaledLinear(nn.Linear):
    """A linear layer with a start of its own, as many model libraries have."""

    def reset_parameters(self):
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)


kinds = {}
for kind in (nn.Linear, ScaledLinear):
    model = nn.Sequential(kind(16, 16), nn.ReLU(), kind(16, 4)).eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    # that the interface is to go is said wherever it is called
    said = [str(w.message) for w in caught if "deprecated" not in str(w.message)]
    x = torch.randn(3, 16)
    kinds[kind.__name__] = (type(quantised[0]).__module__, bool((quantised(x) == model(x)).all()), said)
print(kinds)
assert kinds["Linear"][0].startswith("torch.ao.nn.quantized.dynamic") and not kinds["Linear"][1]
assert kinds["ScaledLinear"] == ("__main__", True, [])
PY
