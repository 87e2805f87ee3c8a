#!/usr/bin/env bash
# torch 2.13.0: torch.export with a dimension given as Dim.AUTO, in a model that branches on it.
#
# Expected: an error or a warning, as Dim("name") gives, where the program serves fewer sizes than were asked for.
# Seen: the range is narrowed to the branch that the example took, without a word; other sizes are refused when the program
# runs.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import warnings

import torch
from torch import nn
from torch.export import Dim, export


class Model(nn.Module):
    def forward(self, x):
        return x * 2 if x.shape[0] <= 16 else x * 3


def exported(dim):
    return export(Model(), (torch.randn(4, 3),), dynamic_shapes=({0: dim},))


with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    program = exported(Dim.AUTO)
(found,) = program.range_constraints.values()
print(f"the range: {found}; warnings: {[str(w.message) for w in said]}")
assert found.upper == 16 and not said
try:
    program.module()(torch.randn(32, 3))
except Exception as error:
    print(f"32 rows: {type(error).__name__}: {error}")
else:
    raise AssertionError("32 rows were served")
try:
    exported(Dim("rows", min=1, max=64))
except Exception as error:
    print(f"by name: {type(error).__name__}")
else:
    raise AssertionError("Dim by name was not refused")
PY
