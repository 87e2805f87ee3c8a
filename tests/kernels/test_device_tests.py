"""The tests for a GPU, where there is none: they work in the interpreter, and only the test to blame is blamed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFTEST = Path(__file__).parent / "device/conftest.py"
TESTS = """
import torch
state = {"lost": False}
torch.cuda.is_initialized = lambda: True
torch.cuda.empty_cache = lambda: None
def synchronize():
    if state["lost"]:
        raise RuntimeError("an illegal memory access was encountered")
torch.cuda.synchronize = synchronize
def test_first(): pass
def test_that_loses_it(): state["lost"] = True
def test_later(): assert not state["lost"]
"""


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    shutil.copy(CONFTEST, folder)
    (folder / "test_pretended.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-v", "--color=no", "-p", "no:cacheprovider", *options]
    # a worker of pytest-xdist must not hand on that it is one
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run([*command, str(folder)], cwd=folder, env=environment, capture_output=True, text=True)


def test_alone_the_process_ends(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 70, done.stdout
    assert "the CUDA context is lost: an illegal memory access" in done.stdout + done.stderr
    assert "test_later" not in done.stdout


@pytest.mark.slow
def test_with_workers_the_others_go_on(tmp_path: Path) -> None:
    done = run(tmp_path, "-n", "1")
    assert done.returncode == 1, done.stdout
    assert "crashed while running 'test_pretended.py::test_that_loses_it'" in done.stdout
    assert "PASSED test_pretended.py::test_later" in done.stdout


@pytest.mark.slow
def test_device_tests_work_in_the_interpreter() -> None:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    chosen = "T17 or autocast or expanded or highest or (nonfinite and v) or (parts and glu)"
    command = [sys.executable, "-m", "pytest", "tests/kernels/device", "-m", "", "-k", chosen, "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    script = [sys.executable, "tests/kernels/device/sanitized.py"]
    done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("ran on cpu") == 8
