import json
import os

import pytest
import torch

from hypermlp_lab.training import Trainer, demo
from hypermlp_lab.training.checkpoint import load_model
from hypermlp_lab.training.files import FolderLock
from tests.cli.conftest import TINY


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    """What a demo writes in the end is drawn byte by byte, and many demos end here."""
    monkeypatch.setattr(demo, "_SAMPLE_BYTES", 8)


def stop_after(monkeypatch, step):
    """Runs stop after ``step`` as if by Ctrl-C."""
    original = Trainer.step

    def stepping(self):
        value = original(self)
        if self.progress.step == step:
            import signal

            os.kill(os.getpid(), signal.SIGINT)
        return value

    monkeypatch.setattr(Trainer, "step", stepping)


def test_demo_end_to_end(command, text_folder, tmp_path):
    out = tmp_path / "demo"
    result = command("demo", "--steps", 3, "--data", text_folder, "--out", out, *TINY)
    assert result.exit_code == 0, result.output
    for word in ("HyperGLU", "softmax", "parameters", "bits per byte", "tokens/s", "peak memory", "goes on from"):
        assert word in result.output
    report = json.loads((out / "report.json").read_text())
    first, second = report["models"]
    assert abs(first["parameters"] - second["parameters"]) <= 0.01 * first["parameters"]
    assert [point["step"] for point in first["history"]] == [0, 1, 2, 3]
    assert first["bits_per_byte"] == first["history"][-1]["bits_per_byte"]
    assert first["bits_per_byte"] < first["history"][0]["bits_per_byte"]
    assert first["training"] == second["training"]
    better = min(report["models"], key=lambda model: model["bits_per_byte"])
    assert f"{better['name']} ends lower than" in result.output
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert load_model(out / "softmax").num_parameters() == second["parameters"]


def test_interrupted_demo_goes_on_and_ends_as_a_whole_one(command, text_folder, tmp_path, monkeypatch):
    arguments = ["demo", "--steps", 3, "--data", text_folder, *TINY]
    command(*arguments, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        result = command(*arguments, "--out", tmp_path / "cut")
    assert result.exit_code == 130
    assert "Stopped after step 2 of HyperGLU" in result.output
    assert not (tmp_path / "cut" / "report.json").exists()
    result = command(*arguments, "--out", tmp_path / "cut")
    assert result.exit_code == 0
    assert "goes on from step 2" in result.output
    whole, cut = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "cut"))
    for a, b in zip(whole["models"], cut["models"], strict=True):
        assert a["history"] == b["history"]


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and not file.name.startswith(".")}


def test_a_demo_that_has_ended_shows_its_result_again(command, text_folder, tmp_path, monkeypatch):
    out = tmp_path / "demo"
    arguments = ["demo", "--steps", 2, "--data", text_folder, "--out", out, *TINY]
    first = command(*arguments)
    before = contents(out)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", None)  # nothing is trained
        again = command(*arguments)
    assert again.exit_code == 0, again.output
    assert contents(out) == before
    verdict = next(line for line in first.output.splitlines() if "bits per byte (one seed)" in line)
    assert verdict in again.output
    assert "--fresh trains anew" in again.output
    fresh = command(*arguments, "--fresh")
    assert fresh.exit_code == 0
    assert "step 2/2" in fresh.output
    assert contents(out).keys() == before.keys()


@pytest.mark.parametrize("ended", [True, False])
def test_a_demo_of_other_options_deletes_nothing_unasked(command, text_folder, tmp_path, monkeypatch, ended):
    out = tmp_path / "demo"
    arguments = ["demo", "--data", text_folder, "--out", out, *TINY]
    with monkeypatch.context() as patch:
        if not ended:
            stop_after(patch, 1)
        command(*arguments, "--steps", 3)
    before = contents(out)
    result = command(*arguments, "--steps", 2)
    assert result.exit_code == 2
    assert "different in eval_every, steps, warmup_steps" in result.output or "different in steps" in result.output
    assert "--fresh (make demo FRESH=1)" in result.output
    assert contents(out) == before
    assert command(*arguments, "--steps", 2, "--fresh").exit_code == 0
    assert load_model(out / "softmax").num_parameters() > 0


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors", "trainer.pt"])
def test_a_demo_that_does_not_load_deletes_nothing(command, text_folder, tmp_path, damage):
    out = tmp_path / "demo"
    arguments = ["demo", "--steps", 2, "--data", text_folder, "--out", out, *TINY]
    command(*arguments)
    file = out / "softmax" / "checkpoint-00000002" / damage
    file.write_bytes(b"not what it was")
    before = contents(out)
    result = command(*arguments)
    assert result.exit_code == 2
    assert f"{file} does not load" in result.output
    assert "--fresh" in result.output
    assert "Traceback" not in result.output
    assert contents(out) == before


@pytest.mark.parametrize("name", ["report.json", "curves.png", "options.json"])
def test_files_of_something_else_stay(command, text_folder, tmp_path, name):
    out = tmp_path / "mine"
    out.mkdir()
    (out / name).write_text("mine")
    for kind in ("demo", "train"):
        if (kind, name) == ("demo", "options.json"):
            continue
        result = command(kind, "--steps", 1, "--data", text_folder, "--out", out, *TINY)
        assert result.exit_code == 2
        assert f"{out / name} exists" in result.output
        assert "--fresh" in result.output
        assert (out / name).read_text() == "mine"
    assert command("train", "--steps", 1, "--data", text_folder, "--out", out, "--fresh", *TINY).exit_code == 0


def test_train_over_a_run_needs_fresh(command, text_folder, tmp_path):
    out = tmp_path / "run"
    arguments = ["train", "--data", text_folder, "--out", out, *TINY]
    assert command(*arguments, "--steps", 2).exit_code == 0
    before = contents(out)
    for more in ([], ["--resume", "--fresh"]):
        result = command(*arguments, "--steps", 1, *more)
        assert result.exit_code == 2
        assert "--fresh" in result.output
        assert contents(out) == before
    # a mistake is found before anything is deleted
    assert command(*arguments, "--steps", 1, "--fresh", "--lr", -1).exit_code == 2
    assert contents(out) == before
    assert command(*arguments, "--steps", 1, "--fresh").exit_code == 0
    assert [folder.name for folder in out.glob("checkpoint-*")] == ["checkpoint-00000001"]
    assert json.loads((out / "options.json").read_text())["steps"] == 1


def test_one_run_at_a_time_in_a_folder(command, text_folder, tmp_path):
    with FolderLock(tmp_path / "out"):
        for kind in ("demo", "train"):
            result = command(kind, "--steps", 1, "--data", text_folder, "--out", tmp_path / "out", *TINY)
            assert result.exit_code == 2
            assert f"is being written by process {os.getpid()} on" in result.output
    assert contents(tmp_path / "out") == {}


def test_train_interrupt_resume_generate(command, text_folder, tmp_path, monkeypatch):
    arguments = ["train", "--steps", 4, "--data", text_folder, "--mixer", "hypermlp", *TINY]
    whole = tmp_path / "whole"
    assert command(*arguments, "--out", whole).exit_code == 0
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        result = command(*arguments, "--out", out)
    assert result.exit_code == 130
    assert f"hypermlp train --resume --out {out}" in result.output

    result = command(*arguments, "--out", out)
    assert result.exit_code == 2
    assert "--resume" in result.output
    result = command("train", "--resume", "--out", out, "--lr", 0.5)
    assert result.exit_code == 2
    assert "--lr 0.5 differs" in result.output

    result = command("train", "--resume", "--out", out)
    assert result.exit_code == 0, result.output
    weights, expected = load_model(out).state_dict(), load_model(whole).state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert (out / "curves.png").is_file()

    sample = [command("generate", out, "--prompt", "def ", "--max-new-tokens", 8, "--seed", 1).output for _ in "ab"]
    assert sample[0] == sample[1]
    assert sample[0].startswith("def ")


def test_a_finished_run_is_trained_longer(command, text_folder, tmp_path):
    out = tmp_path / "a run"
    command("train", "--data", text_folder, "--out", out, "--steps", 20, *TINY)
    result = command("train", "--resume", "--out", out, "--steps", 41)
    assert result.exit_code == 0, result.output
    history = json.loads((out / "report.json").read_text())["models"][0]["history"]
    assert [point["step"] for point in history][-2:] == [40, 41]  # at every second step, as the run was
    assert json.loads((out / "options.json").read_text())["steps"] == 41
    assert f"hypermlp generate '{out}'" in result.output  # a command to copy
    fewer = command("train", "--resume", "--out", out, "--steps", 3)
    assert fewer.exit_code == 2
    assert "--steps 3 differs from the run" in fewer.output


def test_a_model_is_widened_to_another(command, text_folder, tmp_path):
    arguments = ["--data", text_folder, "--steps", 1, *TINY[2:], "--hidden-size", 64]
    command("train", "--mixer", "hyperglu", "--out", tmp_path / "ours", *arguments)
    result = command("train", "--mixer", "softmax", "--match", "hyperglu", "--out", tmp_path / "plain", *arguments)
    assert result.exit_code == 0, result.output
    ours, plain = (load_model(tmp_path / name).num_parameters() for name in ("ours", "plain"))
    assert abs(ours - plain) <= 0.01 * ours
    again = command("train", "--resume", "--steps", 2, "--out", tmp_path / "plain")
    assert again.exit_code == 0, again.output
    wrong = command("train", "--match", "softmax", "--out", tmp_path / "wrong", *arguments)
    assert wrong.exit_code == 2
    assert "train softmax with --match hyperglu" in wrong.output
