"""``import hypermlp`` is light, and nothing imports upwards: models -> layers -> ops -> kernels."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hypermlp

LIBRARY = Path(hypermlp.__file__).parent
KERNELS = LIBRARY.parent / "kernels" / "hypermlp_kernels"


def imported(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


ABOVE = {
    "ops": ("hypermlp.layers", "hypermlp.models", "hypermlp.integrations", "hypermlp.config", "hypermlp.cli"),
    "layers": ("hypermlp.models", "hypermlp.integrations", "hypermlp.cli"),
}


@pytest.mark.parametrize("room", ABOVE)
def test_nothing_imports_upwards(room):
    files = sorted((LIBRARY / room).glob("**/*.py"))
    assert files
    for file in files:
        upwards = {name for name in imported(file) if name.startswith(ABOVE[room])}
        assert not upwards, f"{file.name} imports {upwards}"


def test_the_check_sees_an_import_upwards():
    assert any(name.startswith("hypermlp.ops") for name in imported(LIBRARY / "layers" / "hyper.py"))
    assert any(name.startswith(ABOVE["ops"]) for name in imported(LIBRARY / "layers" / "hyper.py"))


def test_ops_know_no_module():
    for file in (LIBRARY / "ops").glob("**/*.py"):
        assert not {name for name in imported(file) if name.startswith("torch.nn") and "functional" not in name}, file


def test_kernels_know_tensors_and_triton_alone():
    for file in KERNELS.glob("**/*.py"):
        assert not {name for name in imported(file) if name.split(".")[0] == "hypermlp"}, file


def test_importing_the_library_loads_no_extra_and_touches_no_gpu():
    heavy = ["matplotlib", "transformers", "typer", "rich", "safetensors", "hypermlp.cli"]
    program = (
        "import sys, torch; before = set(sys.modules); import hypermlp; "
        "layer = hypermlp.HyperGLU(16, max_lag=4); layer(torch.randn(1, 3, 16)); "
        "assert not torch.cuda.is_initialized(); "
        f"print(sorted((set(sys.modules) - before) & set({heavy!r})))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
