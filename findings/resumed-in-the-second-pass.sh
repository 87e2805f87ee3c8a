#!/usr/bin/env bash
# transformers 5.24.0 (accelerate 1.15.0), torch 2.13.0: Trainer on an IterableDataset, stopped in the second pass over
# the data and resumed from its checkpoint.
#
# Expected: the batches that come next, as when it was stopped in the first pass, and as with a dataset of a known
# length.
# Seen: the pass begins anew, silently: batches that were trained on come again, and others never. (All batches before
# the checkpoint are to be skipped, and a pass that ends while they are is taken for all of them. The project's open
# pull request 33544 is about what this did before.)
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 \
  numpy==2.3.5
cat > "$dir/resume.py" <<'PY'
import logging
import sys
import warnings

import torch
import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments

warnings.simplefilter("ignore")
transformers.logging.disable_default_handler()
said = []
logging.getLogger("transformers").addHandler(logging.Handler())
logging.getLogger("transformers").handlers[-1].emit = lambda record: said.append(record.getMessage())


class Sized(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, i):
        return {"x": torch.tensor([float(i)])}


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from (Sized()[i] for i in range(24))


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(1)), []

    def forward(self, x):
        self.seen.append(x[:, 0].int().tolist())
        return {"loss": (x * self.weight).mean()}


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def batches(data, folder, stop=None, resume=None):
    options = {"use_cpu": True, "report_to": [], "save_strategy": "no", "logging_strategy": "no"}
    options |= {"disable_tqdm": True, "train_sampling_strategy": "sequential"}
    args = TrainingArguments(folder, per_device_train_batch_size=4, max_steps=16, **options)
    trainer = Trainer(Model(), args, train_dataset=data, callbacks=[Stop(stop)] if stop else [])
    trainer.train(resume_from_checkpoint=resume)
    return trainer.model.seen


for data in (Sized(), Stream()):
    name = type(data).__name__
    whole = batches(data, f"{sys.argv[1]}/{name}")
    for stop in (3, 8):
        folder = f"{sys.argv[1]}/{name}{stop}"
        batches(data, folder, stop=stop)
        said.clear()
        after = batches(data, folder, resume=f"{folder}/checkpoint-{stop}")
        about = [message[:60] for message in said if "sample" in message or "batch" in message]
        print(f"{name}, stopped after {stop} batches of 6 a pass: goes on with {after[:2]}", end=", ")
        print(f"right is {whole[stop : stop + 2]}; said: {about}")
        assert (after != whole[stop:]) if name == "Stream" and stop == 8 else (after == whole[stop:])
PY
"$dir/bin/python" "$dir/resume.py" "$dir"
