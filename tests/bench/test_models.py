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
from hypermlp_lab.bench.run import Report
from hypermlp_lab.bench.run import run as run_benchmark
from hypermlp_lab.bench.settings import Settings
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


def test_what_a_step_needs_is_what_there_is_after_it() -> None:
    """Weights, gradients and AdamW's moments of two models at once to the byte, and about what a step keeps."""
    providers = [BY_NAME["hyperglu-chunked"], BY_NAME["softmax"]]
    steps = [TrainingStep(CASE, provider) for provider in providers]
    held, kept = 0, []
    for step in steps:
        saved: dict[int, int] = {}

        def keep(x: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = step.loss()
        own = {p.untyped_storage().data_ptr() for p in step.model.parameters()}
        kept.append(sum(size for place, size in saved.items() if place not in own))
        loss.backward()  # type: ignore[no-untyped-call]
        step.optimizer.step()
        moments = [x for state in step.optimizer.state.values() for x in state.values() if x.ndim]
        held += sum(x.nbytes for p in step.model.parameters() for x in (p, p.grad) if x is not None)
        held += sum(x.nbytes for x in moments)
    needed = models.needed_bytes(CASE, providers) - held
    assert 0.8 * max(kept) < needed < 3 * max(kept)  # with two gradients of the logits, which come later


def test_more_than_the_machine_has_is_said_before_it_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def work(*args: object, **options: object) -> None:
        raise AssertionError("something was built")

    monkeypatch.setattr(models, "total_memory", lambda device: 2**31)
    monkeypatch.setattr(models, "TrainingStep", work)
    result = CliRunner().invoke(app, ["models", "--size", "gpt2", "--out", str(tmp_path / "x.json")])
    assert result.exit_code == 2, result.output
    line = " ".join(result.output.split())
    assert "gpt2, 16 x 256 tokens: 3 models, hyperglu-auto, hyperglu-chunked, softmax, need more than" in line
    assert "GiB together and cpu has 2.0: give a smaller --batch" in line
    assert list(tmp_path.iterdir()) == []
