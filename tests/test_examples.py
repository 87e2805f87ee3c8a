"""The examples run, and say what they promise."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr("sys.argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_custom_model_learns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = run("custom_model.py", ["--steps", "60", "--width", "32", "--pairs", "8"], monkeypatch, capsys)
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", out)]
    assert len(losses) == 10
    assert losses[-1] < 0.9 * losses[0]
    assert "sequences twice as long" in out


def test_train_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} and {n} are {2 * n}. " for n in range(400)))
    size = ["--steps", "4", "--seq-len", "16", "--hidden-size", "16", "--layers", "1", "--out", str(tmp_path / "run")]
    out = run("train_text.py", [str(text), *size, "--prompt", "2 and 2"], monkeypatch, capsys)
    assert "bits per byte" in out
    assert "\n2 and 2" in out
    assert "going on from step 4" in run("train_text.py", [str(text), *size], monkeypatch, capsys)


def test_load_official(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = run("load_official.py", [], monkeypatch, capsys)
    assert all(float(found) < 1e-5 for found in re.findall(r"relative difference (\S+?),?\s", out))
    assert len(re.findall("relative difference", out)) == 2


def test_swap_gpt2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", minversion="5.5", reason="needs the hf extra")
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} and {n} are {2 * n}. " for n in range(400)))
    size = ["--steps", "60", "--tune-steps", "10", "--seq-len", "16", "--batch-size", "4", "--data", str(text)]
    out = run("swap_gpt2.py", [*size, "--out", str(tmp_path / "swapped")], monkeypatch, capsys)
    losses = {
        name.strip(): (float(a), float(b)) for name, a, b in re.findall(r"^(s.+?)\s+(\d\.\d+)\s+(\d\.\d+)", out, re.M)
    }
    kept, fresh, reused = losses.values()
    assert kept[0] < reused[0] < fresh[0]
    assert f"is {kept[0]:.3f} again" in out
    assert (tmp_path / "swapped" / "model.safetensors").exists()


@pytest.mark.slow
def test_swap_vit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", minversion="5.10", reason="ViT is built otherwise before")
    pytest.importorskip("sklearn", reason="needs scikit-learn, which has the pictures")
    out = run("swap_vit.py", ["--epochs", "4", "--tune-epochs", "3"], monkeypatch, capsys)
    kept, fresh, reused = (
        (float(a), float(b)) for a, b in re.findall(r"^s\w+, .*?(\d+\.\d)\s+(\d+\.\d)\s+[\d,]+$", out, re.M)
    )
    assert min(kept) > 20  # of ten digits
    assert max(fresh[0], reused[0]) < kept[0]
    assert max(fresh[1], reused[1]) > 20
    assert re.search(r"at 12 x 12: \d+\.\d %", out)


def test_stream(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = run("stream.py", ["--windows", "10", "--max-lag", "16", "--seconds", "0"], monkeypatch, capsys)
    rows = [line.split() for line in out.rsplit("cache bytes", 1)[1].strip().splitlines()]
    assert [int(row[0]) for row in rows] == list(range(16, 161, 16))
    assert all(float(row[2]) > 0 for row in rows)
    # the ring is full after one window and the prompt
    assert len({row[3] for row in rows[1:]}) == 1


@pytest.mark.slow
def test_train_parallel(tmp_path: Path) -> None:
    """However many processes share the work, losses are the same, and weights are whole."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} and {n} are {2 * n}. " for n in range(400)))
    size = ["--steps", "3", "--seq-len", "32", "--hidden-size", "16", "--layers", "1", "--max-lag", "24"]
    found = []
    for world, split in ((1, []), (4, []), (4, ["--heads", "2", "--sequence", "2"])):
        out = tmp_path / f"{len(found)}.pt"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        command += [str(EXAMPLES / "train_parallel.py"), str(text), *size, "--out", str(out), *split]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(([float(loss) for loss in re.findall(r"loss (\d+\.\d+)", done.stdout)], torch.load(out)))
    (losses, weights), *others = found
    assert len(losses) == 2
    for other_losses, other_weights in others:
        assert other_losses == pytest.approx(losses, abs=1e-3)  # rounded otherwise, in float32
        assert {name: x.shape for name, x in other_weights.items()} == {name: x.shape for name, x in weights.items()}
