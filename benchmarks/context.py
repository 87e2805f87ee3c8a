"""A longer context by ``extend_max_lag``, measured: loss by position, before and after training at the new length.

    python benchmarks/context.py                 # minutes on a CPU; writes benchmarks/results/context-cpu.json
    python benchmarks/context.py --show          # the tables of that file

A byte model is trained on the Python standard library at one length and read at four times that length: as it is (a
window), and extended by ``extend_max_lag`` in both ways. Each of the three is then trained at the longer length for as
many steps, with an optimizer made anew, and read again on the same text.
"""

from __future__ import annotations

import copy
import json
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hypermlp import extend_max_lag
from hypermlp.models import LanguageModel
from hypermlp_lab.bench.environment import describe
from hypermlp_lab.training import Trainer, TrainingConfig, load_corpus
from hypermlp_lab.training.data import Corpus
from hypermlp_lab.training.files import check_place, write_json
from hypermlp_lab.training.recipe import byte_model

OUT = Path(__file__).parent / "results" / "context-cpu.json"
SCHEMA = "hypermlp-context-1"
TIMES = 4
# what is done to the trained model: None leaves it a window
WAYS = {"window": None, "identity": "identity", "continue": "continue"}
SETTINGS: dict[str, Any] = {
    "mixer": "hyperglu", "hidden_size": 96, "num_layers": 3, "max_lag": 128, "batch_bytes": 4096, "seed": 0,
    "steps": 600, "lr": 4e-3, "more_steps": 100, "more_lr": 1e-3, "windows": 256, "bucket": 32,
}  # fmt: skip


def measure(settings: dict[str, Any], corpus: Corpus) -> dict[str, Any]:
    """Losses by position of every way, before and after the training at the longer length."""
    short, seed = settings["max_lag"], settings["seed"]
    long = TIMES * short
    sizes = {name: settings[name] for name in ("hidden_size", "num_layers")}
    torch.manual_seed(seed)
    model = LanguageModel(byte_model(settings["mixer"], seq_len=short, **sizes))
    train(model, corpus, settings, short, settings["steps"], settings["lr"])
    rows: list[dict[str, Any]] = []
    for way, fill in WAYS.items():
        other = copy.deepcopy(model)
        if fill is not None:
            extend_max_lag(other, long, fill=fill)
        for steps in (0, settings["more_steps"]):
            begin = time.process_time()
            if steps:
                train(other, corpus, settings, long, steps, settings["more_lr"])
            losses = by_position(other, corpus, long, settings["windows"])
            buckets = losses.view(-1, settings["bucket"]).mean(1).tolist()
            row = {"way": way, "steps": steps, "parameters": other.num_parameters(), "inside": mean(losses[:short])}
            row |= {"beyond": mean(losses[short:]), "nats": [round(x, 4) for x in buckets]}
            rows.append(row | {"cpu_seconds": round(time.process_time() - begin, 1)})
            print(row, flush=True)
    return {"schema": SCHEMA, "settings": settings | {"length": long, "data": corpus.name}, "rows": rows}


def train(model: LanguageModel, corpus: Corpus, settings: dict[str, Any], length: int, steps: int, lr: float) -> None:
    config = TrainingConfig(
        steps, batch_size=settings["batch_bytes"] // length, seq_len=length, lr=lr, seed=settings["seed"],
        eval_every=steps, eval_windows=16,
    )  # fmt: skip
    if not Trainer(model, corpus, config).run():
        raise SystemExit("stopped: nothing is written")


@torch.no_grad()
def by_position(model: LanguageModel, corpus: Corpus, length: int, windows: int) -> Tensor:
    """Nats a byte at every position of the same windows of unseen text, ``[length]``."""
    model.eval()
    inputs, targets = corpus.validation_windows(windows, length)
    losses = [
        F.cross_entropy(model(x).transpose(1, 2), y, reduction="none").sum(0)
        for x, y in zip(inputs.split(8), targets.split(8), strict=True)
    ]
    return torch.stack(losses).sum(0) / inputs.shape[0]


def mean(losses: Tensor) -> float:
    return round(float(losses.mean()), 4)


def markdown(report: dict[str, Any]) -> str:
    """Mean losses within the old window and beyond it, a row for every way."""
    settings = report["settings"]
    short, length = settings["max_lag"], settings["length"]
    lines = [
        f"| | training at {length} bytes | parameters | bytes 0 to {short - 1} | bytes {short} to {length - 1} |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in report["rows"]:
        how = f"{row['steps']} steps" if row["steps"] else "none"
        cells = (row["way"], how, f"{row['parameters']:,}", f"{row['inside']:.3f}", f"{row['beyond']:.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--show", action="store_true", help="print the tables of --out")
    arguments = parser.parse_args()
    if not arguments.show:
        try:
            check_place(arguments.out)
        except OSError as error:
            parser.error(f"--out {error}")
        environment = describe() | {"threads": torch.get_num_threads()}
        report = measure(SETTINGS, load_corpus()) | {"environment": environment}
        write_json(arguments.out, report, indent=1)
    print(markdown(json.loads(arguments.out.read_text())))


if __name__ == "__main__":
    main()
