"""Runs the kernels' checks in Triton's interpreter, which a process decides on when it imports triton."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed on this platform")
FOLDER = Path(__file__).parent / "interpreted"


@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("check_*.py")))
def test_in_the_interpreter(file: str) -> None:
    check(file, "not slow", timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["check_backward.py", "check_backward_parts.py"])
def test_in_the_interpreter_thoroughly(file: str) -> None:
    check(file, "slow", timeout=1800)


def check(file: str, marked: str, timeout: float) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    for name in [name for name in environment if name.startswith(("PYTEST_", "COV_"))]:
        del environment[name]
    command = [sys.executable, "-m", "pytest", str(FOLDER / file), "-p", "no:cacheprovider", "-p", "no:xdist", "-x"]
    command += ["-m", marked]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
