#!/usr/bin/env bash
# torch 2.13.0 (2.15.0 as well): parametrize.remove_parametrizations of a copy.deepcopy() of a module, as one does to
# store a model with plain weights while the training goes on.
#
# Expected: the original stays as it is, since a deep copy shares nothing with it.
# Seen: the original has no weight any more, and its next call raises AttributeError. A parametrised module has a class
# of its own, which copies share, and removal deletes the property from that class.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import copy
import warnings

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

warnings.simplefilter("error")
x = torch.randn(3, 8)
for name in ("weight_norm", "spectral_norm", "orthogonal"):
    module = getattr(parametrizations, name)(nn.Linear(8, 6))
    module(x)
    parametrize.remove_parametrizations(copy.deepcopy(module), "weight")
    try:
        module(x)
    except AttributeError as error:
        print(f"parametrizations.{name}, removed from a copy: the original raises {error}")
    else:
        raise AssertionError("the original still answers")
PY
