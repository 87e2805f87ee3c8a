"""The processes of these tests run the code that the tests are of."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.distributed.processes import run_checks

ROOT = Path(__file__).parents[2]
# as pytest does it for who calls it from elsewhere: the checkout stands first, and in no variable
SCRIPT = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "kernels")!r}]
from pathlib import Path
from tests.distributed.processes import run_checks
from tests.distributed.test_processes import check_checkout
if __name__ == "__main__":
    print(run_checks({{"checkout": check_checkout}}, Path.cwd(), world=1))
"""


def check_checkout() -> None:
    import hypermlp

    assert Path(hypermlp.__file__).parents[1] == ROOT, hypermlp.__file__


def check_variable() -> None:
    assert os.environ.get("SET_AFTER_THE_START") == "yes"
    assert "SET_BEFORE_THE_START" not in os.environ


def check_sum(tensors: list[torch.Tensor], total: float) -> None:
    assert sum(tensors) == total


def test_a_check_may_hold_many_tensors(tmp_path: Path) -> None:
    check = partial(check_sum, [torch.ones(()) for _ in range(300)], 300.0)
    assert run_checks({"sum": check}, tmp_path, world=1) == {"sum": []}


def test_processes_have_the_environment_of_their_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not that in which the server was started, once for all of them."""
    monkeypatch.setenv("SET_BEFORE_THE_START", "yes")
    assert run_checks({"variable": check_variable}, tmp_path, world=1)["variable"]
    monkeypatch.delenv("SET_BEFORE_THE_START")
    monkeypatch.setenv("SET_AFTER_THE_START", "yes")
    assert run_checks({"variable": check_variable}, tmp_path, world=1) == {"variable": []}


def test_processes_have_the_path_of_the_tests(tmp_path: Path) -> None:
    """And not another checkout that is installed."""
    (tmp_path / "installed" / "hypermlp").mkdir(parents=True)
    (tmp_path / "installed" / "hypermlp" / "__init__.py").touch()
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    command = [sys.executable, "-W", "ignore", "script.py"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip() == "{'checkout': []}"
