#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0: encoders with a text that is padded on the right and masked, and with it alone.
#
# Expected: the same answers at the text's tokens, whatever the hidden tokens are, as of BERT, RoBERTa and ELECTRA.
# Seen: others, silently, so that an answer depends on the longest text of the batch. The mask hides padding from
# attention alone: ConvBERT's convolutions read it, and Funnel pools it. YOSO takes its mask of 0 and 1 for one of
# -10000 and 0, and hides nothing.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import logging

import torch
import transformers

logging.disable(logging.WARNING)  # that faster kernels are not installed
torch.set_default_dtype(torch.float64)
heads = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 2}
models = {
    "Bert": heads,
    "Roberta": heads,
    "Electra": heads,
    "ConvBert": {**heads, "embedding_size": 32, "conv_kernel_size": 5},
    "Funnel": {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48, "block_sizes": [1, 1], "num_decoder_layers": 1},
    "Yoso": heads,
}
for name, own in models.items():
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(vocab_size=64, pad_token_id=0, **own)
    model = getattr(transformers, f"{name}Model")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    text = torch.randint(3, 64, (1, 24))
    found = []
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = 0
        alone = model(text, attention_mask=torch.ones_like(text)).last_hidden_state
        for hidden in (torch.zeros(1, 8, dtype=torch.long), torch.randint(3, 64, (1, 8))):
            mask = (torch.arange(32) < 24).long()[None]
            padded = model(torch.cat([text, hidden], 1), attention_mask=mask).last_hidden_state[:, :24]
            found.append(((padded - alone).norm() / alone.norm()).item())
    print(f"{name}: off by {found[0]:.2g} (relative) beside padding, by {found[1]:.2g} beside other hidden tokens")
    assert max(found) < 1e-6 if name in ("Bert", "Roberta", "Electra") else min(found) > 0.01
PY
