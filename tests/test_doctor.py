"""``python -m hypermlp.doctor``: the whole of it as a user runs it, and each judgement it may come to."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.specifiers import SpecifierSet

from hypermlp import doctor, installed
from hypermlp.installed import missing_extras
from hypermlp.ops import native, self_check, triton
from hypermlp.ops.library import PATHS
from hypermlp.ops.self_check import Judged


def shown(*arguments: str) -> tuple[int, list[str]]:
    found: list[str] = []
    return doctor.main(list(arguments), found.append), found


def test_it_runs_without_the_extras_and_names_nobody() -> None:
    program = (
        "import sys\n"
        "for name in ('typer', 'rich', 'matplotlib', 'safetensors'): sys.modules[name] = None\n"
        "from hypermlp import doctor; sys.exit(doctor.main(['--seconds', '0']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) <= 40, "more than a screen"
    for word in ("hypermlp: ", "torch ", "cpu: ", "gpu", "C++ compiler: ", "chunked: forward and backward", "triton: "):
        assert word in done.stdout
    for private in (os.getcwd(), str(Path.home()), sys.prefix, platform.node()):
        assert private not in done.stdout


def test_the_command_is_the_same() -> None:
    from typer.testing import CliRunner

    from hypermlp_lab import cli

    result = CliRunner().invoke(cli.build_app(), ["doctor", "--seconds", "0"])
    assert result.exit_code == shown("--seconds", "0")[0]
    assert "chunked: forward and backward on" in result.output


def test_a_path_that_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = PATHS["chunked"]

    def wrong(x):
        return right.forward(x)._replace(o=1.5 * right.forward(x).o)

    monkeypatch.setitem(PATHS, "chunked", right._replace(forward=wrong))
    status, lines = shown()
    assert status == 1
    assert any(line.startswith("WRONG chunked: forward and backward on") for line in lines)
    assert lines[-1].startswith("something that should work here does not")


def test_a_path_that_raises_is_named_without_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x):
        raise RuntimeError("/home/somebody/secret/kernels.so: undefined symbol")

    monkeypatch.setitem(PATHS, "chunked", PATHS["chunked"]._replace(forward=wrong))
    status, lines = shown()
    assert status == 1
    assert "WRONG chunked: RuntimeError: kernels.so: undefined symbol" in lines


def test_a_compiler_that_does_not_compile_is_wrong_and_none_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "unavailable", lambda q: "c++ failed")
    monkeypatch.setattr(doctor, "_compiler", lambda: "c++")
    assert shown()[0] == 1
    monkeypatch.setattr(doctor, "_compiler", lambda: "none")
    assert shown()[0] == 0


CHECKS = ("forward_errors", "backward_errors", "step_errors", "conv_errors")


@pytest.mark.parametrize("wrong", [None, *CHECKS, "raises"])
def test_the_kernels_of_each_family_are_judged(wrong: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "unavailable", lambda q: None)
    for check in CHECKS:
        made = float("nan") if check == wrong else 1e-3
        monkeypatch.setattr(doctor, check, lambda *_, made=made: {"o": Judged(made, 2e-3), "other": Judged(0.0, 1.0)})
    if wrong == "raises":

        def launch(*_):
            raise RuntimeError("invalid device function")

        monkeypatch.setattr(doctor, "conv_errors", launch)
    status, lines = shown("--seconds", "0")
    kernels = [line for line in lines if "kernels " in line]
    assert len(kernels) == 3 * 7  # three precisions, of two selections forward, backward and decode, a convolution
    assert status == (wrong is not None)
    bad = [line for line in kernels if line.startswith("WRONG")]
    expected = {None: 0, "conv_errors": 3, "raises": 3}.get(wrong, 6)
    assert len(bad) == expected
    if wrong is None:
        assert "kernels bfloat16 glu forward: at worst 1.0e-03 of 2.0e-03 allowed (o)" in kernels[0]
    elif wrong == "raises":
        assert "RuntimeError: invalid device function" in bad[0]
    else:
        assert "o is off by nan" in bad[0]


def test_the_timing_is_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU; here the CPU takes its place, at one short length."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(doctor, "_TIMED_LENGTHS", (32,))
    lines = list(doctor._timing(0.1, "cpu"))
    assert [line.name for line in lines] == ["T = 32 forward", "T = 32 forward+backward"]
    assert all("HyperGLU" in line.text and "SDPA" in line.text for line in lines)


def test_nothing_was_checked_is_no_pass() -> None:
    assert self_check.describe_wrong({}) == "nothing was checked"


def test_it_names_the_extras_that_are_missing_and_how_to_install_them(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = [
        "torch>=2.6",
        "typer>=0.19; extra == 'lab'",
        "transformers>=5.5; extra == 'hf'",
        'onnx>=1; extra == "test"',
    ]
    there = {"typer": "0.20.1", "transformers": "5.24.0"}
    monkeypatch.setattr(installed, "requires", lambda name: needs)
    monkeypatch.setattr(installed, "installed", lambda name: there.get(name, "none"))
    assert missing_extras() == "lab, hf: all there"
    there["transformers"] = "4.57.1"
    assert missing_extras() == (
        "hf (transformers' models) lacks transformers>=5.5 (4.57.1 is older): in a clone, pip install -e '.[hf]'"
    )
    there.clear()
    assert missing_extras() == (
        "lab (the hypermlp command) lacks typer>=0.19; hf (transformers' models) lacks transformers>=5.5: in a clone, "
        "pip install -e '.[lab,hf]'"
    )
    assert any(line.startswith("extras: lab (the hypermlp command) lacks") for line in shown("--seconds", "0")[1])


@pytest.mark.parametrize(
    "there",
    ["5.5rc1", "5.5.0.dev0", "5.5a0+git1", "5.5", "5.5.0", "5.5+cpu", "5.5.0.post1", "5.6.dev0", "5.6rc1", "5.4.9"],
)  # fmt: skip
def test_a_release_is_older_where_pip_says_so(there: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "installed", lambda name: there)
    enough = SpecifierSet(">=5.5").contains(there, prereleases=True)
    assert (installed._lacking("transformers>=5.5") == "") == enough


def test_extras_of_a_folder_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> list[str]:
        raise installed.PackageNotFoundError(name)

    monkeypatch.setattr(installed, "requires", missing)
    assert "not installed: in a clone, pip install -e ." in missing_extras()
