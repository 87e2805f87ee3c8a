import errno
import os
import subprocess
import sys

import pytest

from hypermlp_lab import cli
from tests.cli.conftest import TINY


@pytest.mark.parametrize("text", ["", "[]", "{", '{"mixer": 5}', "\x00"])
def test_options_that_cannot_be_read_are_named(command, text_folder, tmp_path, text):
    out = tmp_path / "run"
    command("train", "--data", text_folder, "--out", out, "--steps", 1, *TINY)
    (out / "options.json").write_text(text)
    result = command("train", "--resume", "--out", out)
    assert result.exit_code == 2
    assert str(out / "options.json") in result.output
    assert len(result.output.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "/no/such/place"], "no text file or folder at '/no/such/place'"),
        (["--hidden-size", 7], "v_dim"),
        (["--mixer", "mamba"], "mixer 'mamba' is unknown: known are hyperglu, hypermlp, relu, softmax, and labels"),
        (["--mixer", "hyperglue"], "mixer 'hyperglue' is unknown: did you mean hyperglu? known are"),
        (["--match", "SoftMax"], "mixer 'SoftMax' is unknown: did you mean softmax?"),
        (["--mixer", "G-cg-x"], "label 'G-cg-x' is not Base-Feat-Rank-TmixLayout"),
        (["--steps", 0], "steps"),
        (["--seq-len", 100_000], "seq_len=100000"),
        (["--device", "toaster"], "toaster"),
        (["--resume"], "no training run to resume"),
    ],
)
def test_mistakes_get_one_line(command, text_folder, tmp_path, arguments, message):
    result = command("train", "--data", text_folder, *TINY, "--out", tmp_path / "run", *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert len(result.output.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hidden-size", 10**9], "GiB"),
        (["--hidden-size", 10**9, "--layers", 10**9], "GiB"),
        (["--layers", 10**9], "GiB"),
        (["--max-lag", 10**12], "GiB"),
        (["--batch-size", 10**9], "GiB"),
        (["--steps", 10**30], "steps"),
        (["--seed", 10**30], "seed"),
        (["--seed", -1], "seed"),
        (["--batch-size", 0], "batch_size"),
        (["--layers", 0], "num_layers"),
        (["--hidden-size", -8], "hidden_size"),
        (["--seq-len", 0], "seq_len"),
        (["--lr", "nan"], "lr"),
        (["--lr", "inf"], "lr"),
        (["--device", "meta"], "meta holds no values: say cpu, cuda"),
        (["--device", "cuda:77"], "--device 'cuda:77' does not work here"),
        (["--device", ""], "--device '' names no device: say cpu, cuda, cuda:1, ... or auto"),
        (["--device", "cpu:"], "--device 'cpu:' names no device: say cpu, cuda, cuda:1, ... or auto"),
    ],
)
@pytest.mark.parametrize("kind", ["train", "demo"])
def test_sizes_and_devices_that_cannot_be(command, text_folder, tmp_path, kind, arguments, message):
    if kind == "demo" and arguments[0] == "--max-lag":
        pytest.skip("no option of the demo")
    result = command(kind, "--data", text_folder, *TINY, "--out", tmp_path / "run", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["train", "demo"])
def test_places_that_cannot_be_written(command, text_folder, tmp_path, kind):
    (tmp_path / "file").write_text("notes")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        result = command(kind, "--steps", 1, "--data", text_folder, *TINY, "--out", out)
        assert result.exit_code == 2
        assert f"{out} cannot be made a folder" in result.output
        assert len(result.output.strip().splitlines()) == 1
    (tmp_path / "run" / "report.json").mkdir(parents=True)
    result = command(kind, "--steps", 1, "--data", text_folder, *TINY, "--out", tmp_path / "run", "--fresh")
    assert result.exit_code == 2
    assert "report.json cannot be written" in result.output


@pytest.mark.parametrize("kind", ["train", "demo"])
def test_a_full_disk_is_one_line(command, text_folder, tmp_path, monkeypatch, kind):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "run" / "hyperglu").mkdir(parents=True)
    monkeypatch.setattr(os, "fsync", full)
    result = command(kind, "--steps", 1, "--data", text_folder, *TINY, "--out", tmp_path / "run")
    assert result.exit_code == 2
    line = result.output.strip().splitlines()[-1]
    assert line.startswith("hypermlp: ")
    assert str(tmp_path / "run") in line
    assert "No space left on device; free space" in line


def test_missing_extra_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "typer" else object())
    with pytest.raises(SystemExit, match=r'need typer: in a clone, pip install -e "\.\[lab\]"'):
        cli.main()


def test_the_package_runs_as_the_command():
    done = subprocess.run([sys.executable, "-m", "hypermlp", "--help"], capture_output=True, text=True, check=True)
    assert "demo" in done.stdout
    assert "python -m hypermlp" in done.stdout
