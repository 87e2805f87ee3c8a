"""Runs the kernels' checks in Triton's interpreter, which a process decides on when it imports triton."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed on this platform")
FOLDER = Path(__file__).parent / "interpreted"
OPS = Path(__file__).parents[1] / "ops"


# the kernels are a path like the others: small cases of the tests that take any. Three have cases of their own in the
# folder: many tiles, what their softplus makes of large scales, each switch
EVERY_PATH = {OPS / name for name in ("test_definition.py", "test_empty.py", "test_bad_input.py")}
CHOSEN = "interpreted or (triton and not full_size and not large_scales and not each_switch)"

# two processes and no more: each imports torch and triton
BACKWARD = {FOLDER / name for name in ("check_backward.py", "check_backward_parts.py")}
PARTS = {"backward": BACKWARD, "all else": set(FOLDER.glob("check_*.py")) - BACKWARD | EVERY_PATH}


@pytest.mark.parametrize("part", PARTS)
def test_in_the_interpreter(part: str) -> None:
    check(sorted(PARTS[part]), "not slow", 600, "-k", CHOSEN)


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", ["check_backward.py", "check_backward_parts.py", "check_extremes.py", "check_forward.py"]
)
def test_in_the_interpreter_thoroughly(file: str) -> None:
    check([FOLDER / file], "slow", timeout=1800)


def check(files: list[Path], marked: str, timeout: float, *options: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([*(p for p in sys.path if p), str(FOLDER)])
    for name in [name for name in environment if name.startswith(("PYTEST_", "COV_"))]:
        del environment[name]
    command = [sys.executable, "-m", "pytest", *map(str, files), "-p", "no:cacheprovider", "-p", "no:xdist", "-x"]
    command += ["-p", "repairs", "-m", marked, *options]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
