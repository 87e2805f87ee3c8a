#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0: generate(cache_implementation="hybrid") on a Llama.
#
# Expected: a cache of the kind that was asked for, or an error or warning that there is none any more, as
# "sliding_window" gives.
# Seen: a plain DynamicCache, whose memory grows with the length, and not a word.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import logging

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as theirs

said = []
theirs.get_logger("transformers").addHandler(logging.Handler())
theirs.get_logger("transformers").handlers[-1].emit = lambda record: said.append(record.getMessage())
torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).eval()
ids = torch.randint(3, 64, (1, 9))


def made(kind):
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), cache_implementation=kind, **options)
    return type(out["cache"] if "cache" in out else out["past_key_values"]).__name__


kinds = {kind: (made(kind), [text for text in said if "cache_implementation" in text]) for kind in ("static", "hybrid")}
print(kinds)
assert kinds["static"][0] == "StaticCache"
assert kinds["hybrid"] == ("DynamicCache", [])
made("sliding_window")
assert any("sliding_window" in text for text in said)
PY
