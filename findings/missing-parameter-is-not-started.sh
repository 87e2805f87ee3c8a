#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0: from_pretrained of a model with an nn.Parameter that the checkpoint lacks and that
# its _init_weights has nothing for (which linear layers, embeddings and norms need not, for the base class knows them).
#
# Expected: the parameter as __init__ made it, or an error.
# Seen: it is listed as "newly initialized" and is uninitialised memory: numbers that differ from run to run. With
# torch.nn.init in _init_weights it is started.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import tempfile

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


class Config(PretrainedConfig):
    model_type = "demo"


class Model(PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.linear = nn.Linear(4, 4)
        if getattr(config, "table", False):
            self.table = nn.Parameter(torch.full((1 << 16,), 7.0))
        self.post_init()


class Started(Model):
    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self and hasattr(self, "table"):
            nn.init.constant_(self.table, 7.0)


def sevens(cls):
    with tempfile.TemporaryDirectory() as folder:
        cls(Config()).save_pretrained(folder)
        return (cls.from_pretrained(folder, config=Config(table=True)).table == 7).float().mean().item()


shares = {cls.__name__: sevens(cls) for cls in (Model, Started)}
print(f"share of the table that is what __init__ or _init_weights said: {shares}")
assert shares["Started"] == 1 and shares["Model"] < 1
PY
