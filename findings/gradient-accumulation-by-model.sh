#!/usr/bin/env bash
# transformers 5.24.0, accelerate 1.15.0, torch 2.13.0: Trainer(gradient_accumulation_steps=4) with BERT, T5 and BART.
#
# Expected: the step of four rows at once, as with Llama and OPT, with label_smoothing_factor, and with
# model.accepts_loss_kwargs = False.
# Seen: a gradient, and a logged loss, four times as large, silently. Trainer takes every forward with **kwargs for one
# that divides its loss by the tokens of all rows; these take the argument and return the mean of their own row. (The
# project's open issue 47688 describes it.)
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 numpy==2.3.5
"$dir/bin/python" - <<'PY'
import contextlib
import io
import tempfile

import torch
import transformers
from transformers import Trainer, TrainingArguments

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 64, (4, 12))]  # of one length: no padding
small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
pairs = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
models = {
    "LlamaForCausalLM": small,
    "OPTForCausalLM": small | {"word_embed_proj_dim": 16, "ffn_dim": 32, "dropout": 0.0},
    "BertForMaskedLM": small | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "BertForTokenClassification": small | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 64},
    "T5ForConditionalGeneration": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0},
    "BartForConditionalGeneration": pairs | {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "dropout": 0.0},
}


def trained(name, rows_at_once, told=False, **options):
    torch.manual_seed(1)
    config = getattr(transformers, name.partition("For")[0] + "Config")
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
    model = getattr(transformers, name)(config(vocab_size=64, **special, **models[name])).double()
    if told:
        model.accepts_loss_kwargs = False
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=rows_at_once, gradient_accumulation_steps=4 // rows_at_once, max_steps=1,
            max_grad_norm=0.0, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, **options,
        )
        trainer = Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))
        loss = trainer.train().training_loss
    return torch.cat([p.detach().flatten() for p in model.parameters()]) - start, loss


cases = {"plain": {}, "label smoothing": {"label_smoothing_factor": 0.1}, "accepts_loss_kwargs=False": {"told": True}}
for name in models:
    ratios = {}
    for case, options in cases.items():
        if case == "plain" or name.startswith("Bert"):
            (whole, loss), (parts, other) = (trained(name, n, **options) for n in (4, 1))
            ratios[case] = (parts.norm() / whole.norm()).item(), other / loss
    print(name, {case: "step {:.4f}, loss {:.4f} times".format(*both) for case, both in ratios.items()})
    right = 1 if name in ("LlamaForCausalLM", "OPTForCausalLM") else 4
    assert all(abs(r - right) < 1e-3 for r in ratios.pop("plain"))
    assert all(abs(r - 1) < 1e-3 for both in ratios.values() for r in both)
PY
