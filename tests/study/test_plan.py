"""The plan: what is run, what is skipped, and how settings are chosen."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hypermlp.config import HyperConfig
from hypermlp_lab.study import ledger
from hypermlp_lab.study.models import (
    STARTS,
    AutoEncoder,
    Size,
    budget,
    build_model,
    layer_config,
    model_config,
)
from hypermlp_lab.study.plan import (
    BEST,
    COMMON,
    VARIANTS,
    Cell,
    Variant,
    cells,
    chosen,
    pending,
    reported,
    search,
)
from hypermlp_lab.study.presets import NAMES, Preset, preset
from hypermlp_lab.study.runs import Run

SIZE = Size(64, 2, 8, 16, 64)
ALL = [variant for tier in VARIANTS for variant in tier]


def record(run: Run, score: float, loss: float = 1.0) -> dict[str, Any]:
    selection = {"score": score, "loss": loss}
    return {"run": asdict(run), "score": 0.5, "details": {"selection": selection}, "total_cpu_seconds": 1.0}


def small() -> Preset:
    return replace(preset("smoke"), lrs=(1e-3, 3e-3), text_lrs=(1e-3, 3e-3), baseline_heads=(4, 2), table_lrs=(0.1,))


def test_variants_are_those_of_the_study() -> None:
    names = {variant.name for variant in ALL}
    wanted = "S-pc R-pc R-cg-q R-cg-q-1o R-cg-q-12o R-g-q-12o R-12o! R-12! G-cg-q G-cg-q-1o G-cg-q-12o"
    assert names >= {*wanted.split(), "S-pc@paper", "R-cg-q-12o@paper", "G-cg-q-12o@paper"}
    with pytest.raises(ValueError, match="start"):
        Variant("S-pc@authors")
    with pytest.raises(ValueError, match="label"):
        Variant("S-zz")


@pytest.mark.parametrize("variant", ALL, ids=lambda variant: variant.name)
@pytest.mark.parametrize("heads", [2, 4])
def test_budgets_are_matched_unless_the_label_says_not(variant: Variant, heads: int) -> None:
    counts = {}
    for label in (variant.label, "S-pc"):
        model = build_model(label, SIZE, heads if label != "S-pc" else 4, "reset")
        counts[label] = sum(parameter.numel() for parameter in model.parameters())
    off = counts[variant.label] / counts["S-pc"] - 1
    if variant.label.endswith("!"):
        assert model_config(variant.label, SIZE, heads).intermediate_size == 176
        assert off > 0.05
    else:
        assert abs(off) < 0.01


def test_both_counts_are_printed() -> None:
    line = budget("R-12o!", SIZE, 2)
    counts = [
        sum(parameter.numel() for parameter in build_model(label, SIZE, heads, "reset").parameters())
        for label, heads in (("R-12o!", 2), ("S-pc", 4))
    ]
    assert f"{counts[0]:,} parameters, S-pc {counts[1]:,} (+" in line


def test_starts() -> None:
    torch.manual_seed(0)
    models = {start: build_model("G-cg-q-12o", SIZE, 2, start) for start in STARTS}
    layers = {start: model.blocks[0].attention for start, model in models.items()}  # type: ignore[union-attr]
    q = {start: layer.q_proj.weight.std().item() for start, layer in layers.items()}
    assert q["gpt"] == pytest.approx(0.02, rel=0.1)
    assert q["paper"] == pytest.approx(0.02, rel=0.1)
    # widths 64 and 4: 1 / sqrt(64) / sqrt(4)
    assert q["reset"] == pytest.approx(1 / 16, rel=0.1)
    assert layers["gpt"].o_proj.weight.std().item() == pytest.approx(0.01, rel=0.1)
    taps = {start: layer.k_conv.weight[:, -1].mean().item() for start, layer in layers.items()}
    assert taps["reset"] == pytest.approx(1, abs=0.02)
    assert taps["gpt"] == pytest.approx(1, abs=0.02)
    assert taps["paper"] == pytest.approx(0, abs=0.02)
    with pytest.raises(ValueError, match="start"):
        build_model("S-pc", SIZE, 4, "xavier")  # type: ignore[arg-type]


def test_autoencoder_sees_the_last_state_alone() -> None:
    torch.manual_seed(0)
    model = build_model("S-pc", SIZE, 4, "reset", autoencoder=True)
    assert isinstance(model, AutoEncoder)
    tokens = torch.randint(16, (2, 12))
    logits = model(tokens)
    assert logits.shape == (2, 12, 16)
    # the first token reaches every place, by way of the last one's state
    changed = model(torch.cat([tokens[:, :1] + 1, tokens[:, 1:]], dim=1) % 16)
    assert (changed - logits).abs().amax(dim=(0, 2)).min() > 0


@pytest.mark.parametrize("name", NAMES)
def test_presets_are_whole(name: str) -> None:
    study = preset(name, device="cpu")
    assert {job.name for job in study.tasks} == {
        "recall", "noisy-recall", "fuzzy-recall", "selective-copying", "memorization", "compression",
    }  # fmt: skip
    assert len(set(study.tasks)) == len(study.tasks)
    assert study.sweep_seed not in range(max(study.task_seeds, study.text_seeds))
    for job in study.tasks:
        assert job.task is not None
        assert job.task.width <= job.seq_len
    runs = pending(study, (*study.tasks, study.text), {})[0]
    for label, size, heads in {(run.label, run.job.size, run.heads) for run in runs}:
        assert model_config(label, size, heads)


def search_all(study: Preset, cell: Cell, records: dict[Run, dict[str, Any]], score: Callable[[Run], float]) -> None:
    """Make the records of a whole search."""
    while missing := [run for stage in search(study, cell, records) for run in stage if run not in records]:
        assert chosen(study, cell, records) is None
        assert reported(study, cell, records, BEST) is None
        records |= {run: record(run, score(run)) for run in missing}


def test_every_variant_gets_the_same_search() -> None:
    study = small()
    for _, cell in cells(study, study.tasks[:1]):
        records: dict[Run, dict[str, Any]] = {}
        search_all(study, cell, records, lambda run: run.lr + (run.start == "gpt"))
        conv_size = HyperConfig.from_label(cell.variant.label, 64).conv_size
        starts = 1 if cell.variant.fixed_start else 3 if conv_size else 2
        heads = 1 if cell.variant.hyper else 2
        tables = (
            1
            if cell.variant.fixed_start is None
            and {"1", "1o", "2", "12", "12o", "12!", "12o!"} & {*cell.variant.label.split("-")}
            else 0
        )
        assert len(records) == 2 + starts - 1 + tables + heads - 1
        assert sum(run.table_lr == 0.1 for run in records) == tables
        rates = [run for run in records if run.start == cell.variant.starts[0] and run.heads == heads * 2]
        assert {run.lr for run in rates} == {1e-3, 3e-3}
        # one thing at a time, at the best of what came before
        assert all(run.lr == 3e-3 for run in records if run not in rates)
        assert {run.start for run in records} == set(cell.variant.starts)
        assert {run.seed for run in records} == {study.sweep_seed}


@pytest.mark.parametrize("heads", [2, 4, 8])
@pytest.mark.parametrize("label", ["R-cg-h-12o", "G-cg-h-12o"])
def test_h_is_q_with_queries_of_half_the_width(label: str, heads: int) -> None:
    half, quarter = (layer_config(name, SIZE, heads) for name in (label, label.replace("h", "q")))
    assert (quarter.qk_dim, half.qk_dim) == (16, 32)
    assert replace(half, qk_dim=16) == quarter


@pytest.mark.parametrize("text", [False, True])
def test_the_best_is_chosen_on_the_other_split_and_given_reported_seeds(text: bool) -> None:
    study = small()
    job = study.text if text else study.tasks[0]
    cell = Cell(Variant("S-pc"), job)
    records: dict[Run, dict[str, Any]] = {}
    better, worse = (0.1, 0.9) if text else (0.9, 0.1)
    search_all(study, cell, records, lambda run: better if run.lr == 1e-3 and run.start == "gpt" else worse)
    # what is reported says the contrary
    for run, made in records.items():
        made["score"] = worse if run.start == "gpt" else better
    heads = search(study, cell, records)[-1]
    assert [(run.heads, run.lr, run.start, run.seed) for run in heads] == [(2, 1e-3, "gpt", study.sweep_seed)]
    # as good on the split, with a lower loss
    records[heads[0]] = record(heads[0], better, 0.5)
    best_runs = reported(study, cell, records, BEST)
    assert best_runs is not None
    assert [(run.heads, run.lr, run.start, run.seed) for run in best_runs] == [(2, 1e-3, "gpt", s) for s in (0, 1)]
    common = reported(study, cell, records, COMMON)
    assert common is not None
    assert [(run.heads, run.lr, run.start, run.seed) for run in common] == [(4, 3e-3, "reset", s) for s in (0, 1)]


def test_a_study_ends_with_everything_and_each_run_once() -> None:
    study = small()
    jobs = study.tasks[:1]
    records: dict[Run, dict[str, Any]] = {}
    order = []
    left = []
    while True:
        queue, waiting = pending(study, jobs, records)
        assert not set(queue) & set(records)
        if not queue:
            break
        left.append(len(queue) + sum(waiting.values()))
        records[queue[0]] = record(queue[0], len(records) % 7 / 7)
        order.append(queue[0])
    assert sum(waiting.values()) == 0
    # what is left never grows: waiting runs are counted from the start
    assert left == sorted(left, reverse=True)
    for _, cell in cells(study, jobs):
        for which in (BEST, COMMON):
            runs = reported(study, cell, records, which)
            assert runs is not None
            assert all(run in records for run in runs)
    # the main claim's variants are answered before the others are begun
    first = {variant.label for variant in VARIANTS[0]}
    other = next(i for i, run in enumerate(order) if run.label not in first)
    assert all(
        run in order[:other]
        for tier, cell in cells(study, jobs)
        if tier == 0
        for run in reported(study, cell, records, BEST) or []
    )


def test_records_survive_a_kill(tmp_path: Path) -> None:
    file, study = tmp_path / "mad.jsonl", small()
    runs = [run for run in pending(study, study.tasks[2:3], {})[0] if run.label == "S-pc"]
    for run in runs[:3]:
        ledger.append(file, record(run, 0.1 + 0.2))
    whole = file.read_bytes()
    assert list(ledger.read(file)) == runs[:3]
    assert ledger.read(file)[runs[0]]["details"]["selection"]["score"] == 0.1 + 0.2
    file.write_bytes(whole + whole[:100])
    assert list(ledger.read(file)) == runs[:3]
    ledger.mend(file)
    assert file.read_bytes() == whole
    ledger.append(file, record(runs[3], 0.5))
    assert list(ledger.read(file)) == runs[:4]
    assert ledger.read(tmp_path / "none.jsonl") == {}


@pytest.mark.parametrize(
    "values",
    [{"table_lr": None}, {"table_lr": [1]}, {"lr": "0.1"}, {"lr": float("nan")}, {"weight_decay": -1}, {"heads": 2.0}],
)
def test_a_record_whose_numbers_are_none_is_refused(tmp_path: Path, values: dict[str, Any]) -> None:
    study = small()
    run = pending(study, study.tasks[:1], {})[0][0]
    file = tmp_path / "mad.jsonl"
    file.write_text(json.dumps({"run": asdict(run) | values}) + "\n")
    with pytest.raises(ValueError, match=rf"mad\.jsonl, line 1, is not a record .*{next(iter(values))} must be"):
        ledger.read(file)


@pytest.mark.parametrize("line", [b"{", b"[1]", b'{"run": {"label": "S-pc"}}', json.dumps({"run": 3}).encode()])
def test_a_foreign_file_is_refused(tmp_path: Path, line: bytes) -> None:
    file = tmp_path / "mad.jsonl"
    file.write_bytes(line + b"\n")
    with pytest.raises(ValueError, match=r"mad\.jsonl, line 1"):
        ledger.read(file)
