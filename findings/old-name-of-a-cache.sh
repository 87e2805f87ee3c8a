#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0: a Dory that is called with the past_key_values of its last answer.
#
# Expected: it goes on where the cache ends, as every other causal model does that answers with past_key_values.
# Seen: logits of the new tokens alone, silently. The argument's new name is cache. Other models take both; this one has
# no such alias, and its keyword arguments swallow the old name. cache=out.past_key_values is right.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import logging
import warnings

import torch
import transformers

logging.disable(logging.WARNING)  # that past_key_values gets a new name, for Llama
warnings.simplefilter("ignore", FutureWarning)  # the same
models = {"Llama": {}, "Dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1}}
for name, own in models.items():
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, **own,
    )
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    text, errors = torch.randint(3, 64, (1, 16)), {}
    with torch.no_grad():
        right = model(text, use_cache=False).logits[:, 12:]
        alone = model(text[:, 12:], use_cache=False).logits
        for argument in ("cache", "past_key_values"):
            cache = model(text[:, :12], use_cache=True).past_key_values
            found = model(text[:, 12:], use_cache=True, **{argument: cache}).logits
            errors[argument] = ((found - right).norm() / right.norm()).item()
            print(f"{name}, {argument}=...: logits off by {errors[argument]:.2g} (relative)")
    assert errors["cache"] < 1e-5
    if name == "Dory":
        assert errors["past_key_values"] > 0.01 and torch.allclose(found, alone, atol=1e-5)
    else:
        assert errors["past_key_values"] < 1e-5
PY
