"""Runs and their runner: what is trained and scored, and that nothing done is lost or done twice."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from hypermlp_lab.study import ledger, runs
from hypermlp_lab.study.command import app
from hypermlp_lab.study.models import build_model, model_config
from hypermlp_lab.study.plan import pending
from hypermlp_lab.study.presets import Preset, preset
from hypermlp_lab.study.runner import Runner, duration
from hypermlp_lab.study.runs import TEXT, Job, Run, accuracy, corpus_of, halves, perform
from hypermlp_lab.study.tasks import IGNORED, Examples, Task
from hypermlp_lab.training.recipe import parameter_count


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def job(name: str, **options: object) -> Job:
    made = next(job for job in preset("smoke").tasks if job.name == name)
    return replace(made, **options)  # type: ignore[arg-type]


def run_of(job: Job, label: str = "G-cg-q-12o", **options: object) -> Run:
    return replace(Run(job, label, "reset", 3e-3, 0.1, 2, 0), **options)  # type: ignore[arg-type]


def test_equal_runs_give_equal_results_and_others_do_not() -> None:
    run = run_of(job("recall"))
    first, again = perform(run), perform(run)
    assert first["details"] == again["details"]
    assert [point["loss"] for point in first["curve"]] == [point["loss"] for point in again["curve"]]
    assert json.loads(json.dumps(first)) == first
    assert Run.from_dict(first["run"]) == run
    assert first["cpu_seconds"] <= first["total_cpu_seconds"]
    config = model_config(run.label, run.job.size, run.heads)
    assert first["parameters"] == parameter_count(config)
    assert first["widths"]["intermediate_size"] == config.intermediate_size
    for other in (replace(run, seed=1), replace(run, start="gpt"), replace(run, lr=1e-2), replace(run, heads=1)):
        assert perform(other)["details"]["report"]["loss"] != first["details"]["report"]["loss"]
        assert other != run


@pytest.mark.parametrize("label", ["S-pc", "G-cg-q-12o"])
def test_a_map_is_learnt(label: str) -> None:
    record = perform(run_of(job("memorization", steps=150, hidden_size=32, batch_size=16), label, lr=1e-2))
    assert record["curve"][0]["score"] < 0.5
    assert record["score"] > 0.95
    assert record["selection"] > 0.95
    assert record["diverged_at"] is None


def test_a_run_that_diverges_is_a_result() -> None:
    record = perform(run_of(job("compression"), lr=1e30))
    assert record["diverged_at"] in (2, 3)
    assert 0 <= record["score"] <= 1


class Fixed(nn.Module):
    """Says what it is told, whatever comes."""

    def __init__(self, said: Tensor) -> None:
        super().__init__()
        self.said, self.weight = said, nn.Parameter(torch.zeros(1))

    def forward(self, inputs: Tensor) -> Tensor:
        return 9 * nn.functional.one_hot(self.said[inputs[:, 0]], 4).float()


def test_accuracy_counts_scored_tokens_alike() -> None:
    scored = torch.tensor([[0, IGNORED, 1], [0, 0, IGNORED], [2, 0, 0]])
    said = torch.tensor([[0, 3, 3], [0, 0, 1], [2, 1, 1]])
    inputs = torch.arange(3)[:, None].expand(3, 3)
    for batch_size in (1, 2, 3):
        found = accuracy(Fixed(said), Examples(inputs, scored, scored), batch_size)
        assert found["score"] == pytest.approx(4 / 7)
        # of answer 0 three of five, of 1 none, of 2 all
        assert found["macro"] == pytest.approx((3 / 5 + 0 + 1) / 3)
        wrong = torch.tensor([9.0, 0, 0, 0]).log_softmax(0)
        assert found["loss"] == pytest.approx(-(4 * wrong[0] + 3 * wrong[1]).item() / 7, rel=1e-5)


def test_text_is_scored_on_halves_that_do_not_meet(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(f"line {i} of the text\n" for i in range(2000)))
    corpus = corpus_of(str(tmp_path / "text.txt"))
    selection, report = halves(corpus)
    assert torch.equal(torch.cat([selection.validation, report.validation]), corpus.validation)
    assert torch.equal(selection.train, report.train)
    text = replace(preset("smoke").text, data=str(tmp_path / "text.txt"), steps=20, evaluations=2)
    record = perform(run_of(text, lr=1e-2))
    assert [point["step"] for point in record["curve"]] == [0, 10, 20]
    assert record["curve"][0]["loss"] > record["curve"][2]["loss"] == record["score"] != record["selection"]
    assert record["tokens"] == 20 * 4 * 16


def test_two_spellings_of_one_path_are_the_same_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    file, link = tmp_path / "text.txt", tmp_path / "link.txt"
    file.write_text("some text")
    link.symlink_to(file)
    monkeypatch.chdir(tmp_path)
    spelled = ["text.txt", "./text.txt", "folder/../text.txt", str(file), "link.txt"]
    jobs = {preset("smoke", data=data).text for data in spelled}
    assert len(jobs) == 1
    # a record that was written with another spelling is of the same run
    run = run_of(jobs.pop())
    old = asdict(run)
    old["job"]["data"] = "text.txt"
    assert Run.from_dict(old) == run
    assert preset("smoke", data="folder").text != run.job
    assert preset("smoke").text.data is None


def tiny() -> Preset:
    """Few runs: one task, the variants of the main claim."""
    made = preset("smoke")
    return replace(made, tasks=made.tasks[4:5], tiers=1, task_seeds=1)


def test_the_runner_stops_goes_on_and_repeats_nothing(tmp_path: Path) -> None:
    file, study, lines = tmp_path / "out" / "mad.jsonl", tiny(), []

    def log(line: str) -> None:
        lines.append(line)
        if len(lines) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    assert not Runner(study, study.tasks, file, 2, 1, log).run()
    done = ledger.read(file)
    # the runs at hand were ended and kept
    assert 3 <= len(done) == len(lines) <= 4
    total = len(done) + len(pending(study, study.tasks, done)[0]) + sum(pending(study, study.tasks, done)[1].values())
    file.write_bytes(file.read_bytes() + b'{"run": {"jo')
    assert Runner(study, study.tasks, file, 1, 1, lines.append).run()
    records = ledger.read(file)
    assert list(records)[: len(done)] == list(done)
    assert len(lines) == len(records) == len(file.read_text().splitlines()) <= total
    assert pending(study, study.tasks, records)[0] == []
    # two processes: either of the first two may end first
    assert re.match(
        r" *1/\d+, \d+ (min|h \d\d min) left  memorization +(S-pc|G-cg-q-12o) .*: \d\.\d{4}, \d+ s$", lines[0]
    )
    for record in records.values():
        assert {"torch", "python", "cpu", "commit", "threads"} <= record["environment"].keys()
    some = next(iter(records))
    assert perform(some)["details"] == records[some]["details"]
    assert Runner(study, study.tasks, file, 1, 1, lines.append).run()
    assert len(lines) == len(records)


def test_a_killed_process_loses_its_run_alone(tmp_path: Path) -> None:
    file, study = tmp_path / "mad.jsonl", tiny()

    def log(line: str) -> None:
        for child in multiprocessing.active_children():
            child.kill()

    with pytest.raises(ChildProcessError, match="start again"):
        Runner(study, study.tasks, file, 1, 1, log).run()
    assert len(ledger.read(file)) == 1


def test_mistakes_on_the_command_line(tmp_path: Path) -> None:
    for arguments, named in (
        (["mad", "--preset", "large"], "smoke"),
        (["text", "--preset", "smoke", "--data", str(tmp_path / "none")], "none"),
        (["report", "--preset", "smoke", "--out", str(tmp_path)], "no records"),
        (["mad", "--preset", "smoke", "--device", "tpu"], "tpu"),
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert named in result.output
    (tmp_path / "mad.jsonl").write_text("{}\n")
    result = CliRunner().invoke(app, ["report", "--preset", "smoke", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "line 1" in result.output


def test_durations() -> None:
    assert [duration(s) for s in (10, 100, 3 * 3600 + 300)] == ["0 min", "2 min", "3 h 05 min"]


def test_text_is_one_of_the_jobs() -> None:
    assert preset("cpu").text.name == TEXT
    assert Task("recall", 16, 64) in [job.task for job in preset("cpu").tasks]


@pytest.mark.parametrize("name", ["recall", "text"])
def test_tables_move_at_their_own_learning_rate(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    study = preset("smoke")
    job = study.text if name == "text" else study.tasks[0]
    first = Run(replace(job, steps=1), "R-cg-q-12o", "reset", 1e-2, 0.0, 2, 0)
    moved = {}
    for run in (first, replace(first, table_lr=0.1)):
        models: list[nn.Module] = []

        def build(*args: Any, models: list[nn.Module] = models, **options: Any) -> nn.Module:
            models.append(build_model(*args, **options))
            return models[0]

        monkeypatch.setattr(runs, "build_model", build)
        perform(run)
        torch.manual_seed(run.seed)
        start = build_model(run.label, job.size, run.heads, run.start)
        pairs = zip(start.named_parameters(), models[0].parameters(), strict=True)
        moved[run.table_lr] = {at: (after - before).abs().max().item() for (at, before), after in pairs}
    tables = {at for at in moved[1.0] if at.endswith((".down", ".up", ".diag"))}
    assert len(tables) == 6 * job.num_layers
    for at, distance in moved[1.0].items():
        # Adam's first step is the learning rate in every entry that has a gradient
        assert moved[0.1][at] == pytest.approx(distance * (0.1 if at in tables else 1.0), rel=1e-3)
