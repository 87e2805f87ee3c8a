"""Training steps of whole models: what is measured, and what is refused."""

from __future__ import annotations

import json
from inspect import signature
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hypermlp.ops.library import PATHS
from hypermlp_lab import commands
from hypermlp_lab.bench import gate, models
from hypermlp_lab.bench.command import app
from hypermlp_lab.bench.models import MODEL_PROVIDERS, ModelBenchmark, ModelCase, TrainingStep
from hypermlp_lab.bench.results import markdown
from hypermlp_lab.bench.run import Report, Settings
from hypermlp_lab.bench.run import run as run_benchmark
from hypermlp_lab.training import TrainingConfig, load_corpus
from hypermlp_lab.training.demo import Demo

CASE = ModelCase(length=24, batch=2, size="demo")
BY_NAME = {provider.name: provider for provider in MODEL_PROVIDERS}


def run() -> Report:
    providers = [BY_NAME["hyperglu-chunked"], BY_NAME["softmax"]]
    settings = Settings((CASE,), repeats=3, seconds=0.1)
    return run_benchmark(ModelBenchmark(providers, settings), log=lambda line: None)


def check(name: str) -> gate.Verdict:
    return gate.check(name, ModelBenchmark([BY_NAME[name]], Settings((CASE,))).trials(BY_NAME[name]))


def test_both_models_are_of_one_size() -> None:
    for case in (CASE, ModelCase(length=1024, batch=8)):
        counts = [
            sum(p.numel() for p in models.LanguageModel(config, device="meta").parameters())
            for config in case.configs().values()
        ]
        assert abs(counts[0] / counts[1] - 1) < 0.01
    assert 120e6 < counts[0] < 130e6


def test_the_demos_models_are_those_of_the_demo(tmp_path: Path) -> None:
    config = TrainingConfig(1, seq_len=CASE.length)
    text = tmp_path / "text.txt"
    text.write_text("a line of text\n" * 100)
    demo = Demo(load_corpus(text), config, hidden_size=128, num_layers=3, out=tmp_path, device=torch.device("cpu"))
    assert CASE.configs() == demo.model_configs()
    defaults = signature(commands.demo).parameters
    assert (defaults["hidden_size"].default, defaults["layers"].default) == (128, 3)


def test_command(tmp_path: Path) -> None:
    out = tmp_path / "models.json"
    arguments = ["models", "--lengths", "24", "--batch", "2", "--repeats", "3", "--seconds", "0.1", "--out", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert [row["provider"] for row in report["rows"]] == ["hyperglu-auto", "hyperglu-chunked", "softmax"]
    assert len({verdict["passed"] for verdict in report["gate"]}) == 1
    assert abs(report["rows"][0]["parameters"] / report["rows"][2]["parameters"] - 1) < 0.01
    for wrong, named in ((["--size", "huge"], "demo, gpt2"), (["--dtype", "float64"], "float32 nor bfloat16")):
        result = CliRunner().invoke(app, [*arguments, *wrong])
        assert result.exit_code == 2
        assert named in result.output


def test_a_report_of_what_was_measured() -> None:
    report = run()
    assert [row["provider"] for row in report["rows"]] == ["hyperglu-chunked", "softmax"]
    for row in report["rows"]:
        assert row["tokens_per_second"] == pytest.approx(48 / (1e-3 * row["median_ms"]))
        assert row["extra_peak_bytes"] > 0
    assert report["rows"][1]["time_ratio"] == {"softmax": 1.0}
    assert "demo, 2 x 24 tokens" in markdown(report)


@pytest.mark.parametrize("lengths", [(1, 24), (24, 1)])
def test_the_longest_is_checked_whatever_the_order(lengths: tuple[int, ...]) -> None:
    benchmark = ModelBenchmark(MODEL_PROVIDERS, Settings(CASE.at(*lengths)))
    assert list(benchmark.trials(MODEL_PROVIDERS[0])) == ["demo, T = 24"]


def test_a_step_learns() -> None:
    step = TrainingStep(CASE, BY_NAME["hyperglu-chunked"])
    before = step.loss().item()
    for _ in range(10):
        step()
    assert step.loss().item() < before


def test_a_wrong_path_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check("hyperglu-chunked").passed
    right = PATHS["chunked"].forward
    wrong = PATHS["chunked"]._replace(forward=lambda x: tuple(1.5 * y for y in right(x)))
    monkeypatch.setitem(PATHS, "chunked", wrong)
    assert not check("hyperglu-chunked").passed
    report = run()
    assert [row["provider"] for row in report["rows"]] == ["softmax"]


def test_a_path_that_cannot_run_here_says_why() -> None:
    verdict = check("hyperglu-triton")
    assert not verdict.passed
    assert "GPU" in verdict.reason
