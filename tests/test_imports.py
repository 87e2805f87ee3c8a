"""``import hypermlp`` is light, and nothing imports upwards."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hypermlp

ROOT = Path(__file__).parents[1]
LIBRARY = Path(hypermlp.__file__).parent
KERNELS = ROOT / "kernels" / "hypermlp_kernels"
LAB = ROOT / "benchmarks" / "hypermlp_lab"
# every folder of source, by the name that it is imported under
SOURCES = {
    "hypermlp_kernels": KERNELS,
    "hypermlp": LIBRARY,
    "hypermlp_lab": LAB,
    "benchmarks": ROOT / "benchmarks",
    "tools": ROOT / "tools",
}
# packages of many rooms
FACES = ("hypermlp", "hypermlp_lab")
# from the ground up: a room imports from lower floors and from itself
FLOORS = (
    {"hypermlp_kernels", "hypermlp.checks", "hypermlp.evaluating", "hypermlp.installed"},
    {"hypermlp.ops"},
    {"hypermlp.config"},
    {"hypermlp.cache", "hypermlp.budget"},
    {"hypermlp.layers"},
    {"hypermlp.integrations", "hypermlp.distributed", "hypermlp.inspect", "hypermlp.optim"},
    {"hypermlp.models"},
    # a recipe around whole models stands above the rest of its folder
    {"hypermlp.generation", "hypermlp.doctor", "hypermlp.integrations.torchtitan"},
    {"hypermlp.__init__"},
    {"hypermlp_lab.text", "hypermlp_lab.console", "hypermlp_lab.page"},
    {"hypermlp_lab.training"},
    {"hypermlp_lab.bench"},
    {"hypermlp_lab.study", "hypermlp_lab.inspect", "hypermlp_lab.plan"},
    {"hypermlp_lab.commands"},
    {"hypermlp_lab.cli", "hypermlp_lab.__init__"},
    {"hypermlp.__main__"},
    {"benchmarks", "tools"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = {
    ".".join((name, *file.relative_to(folder).with_suffix("").parts)): file
    for name, folder in SOURCES.items()
    for file in sorted(folder.glob("**/*.py"))
    if folder == LAB or LAB not in file.parents
}


def room(module: str) -> str:
    """``hypermlp.ops`` of ``hypermlp.ops.chunked``; the kernels and the scripts are rooms as a whole."""
    parts = module.split(".")
    if parts[0] == "hypermlp" and parts[1:2] and parts[1] in hypermlp.__all__:
        return "hypermlp.__init__"
    if module in FLOOR:
        return module
    return ".".join(parts[:2]) if parts[0] in FACES else parts[0]


def imported(file: Path) -> set[str]:
    """Modules named in a file's imports, those inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            module = node.module or ""
            # the public names of the package stand in rooms below, which the package's face may say
            names |= {f"{module}.{alias.name}" for alias in node.names} if module in FACES else {module}
    return names


def upwards(module: str, names: set[str]) -> set[str]:
    """Rooms that ``module`` must not import from, of those that it does."""
    own = room(module)
    rooms = {room(name) for name in names if name.split(".")[0] in SOURCES} - {own, "hypermlp.__version__"}
    return {other for other in rooms if FLOOR.get(other, len(FLOORS)) >= FLOOR[own]}


@pytest.mark.parametrize("module", FILES)
def test_nothing_imports_upwards(module):
    assert room(module) in FLOOR, f"{module} is on no floor: give its folder one in FLOORS"
    assert not upwards(module, imported(FILES[module]))


def test_no_folder_of_source_is_forgotten():
    apart = {"tests", "docs", "examples", "findings"}
    folders = {file.relative_to(ROOT).parts[0] for file in ROOT.glob("[!.]*/**/*.py")}
    assert folders - apart == {folder.relative_to(ROOT).parts[0] for folder in SOURCES.values()}


def test_the_check_sees_an_import_upwards():
    names = imported(LIBRARY / "layers" / "hyper.py")
    assert "hypermlp.ops" in {room(name) for name in names}
    assert not upwards("hypermlp.layers.hyper", names)
    assert upwards("hypermlp.ops.attention", names) == {"hypermlp.config", "hypermlp.layers"}
    assert upwards("hypermlp_lab.training.trainer", {"hypermlp_lab.bench.run", "tools.kernels.report_forward"}) == {
        "hypermlp_lab.bench", "tools",
    }  # fmt: skip
    assert upwards("hypermlp.models.language_model", {"hypermlp_lab.text"}) == {"hypermlp_lab.text"}
    assert upwards("hypermlp.layers.hyper", {"hypermlp.HyperCache"}) == {"hypermlp.__init__"}
    assert not upwards("hypermlp_lab.bench.layers", {"hypermlp.HyperCache"})


def test_ops_know_no_module():
    for file in (LIBRARY / "ops").glob("**/*.py"):
        assert not {name for name in imported(file) if name.startswith("torch.nn") and "functional" not in name}, file


def test_kernels_know_tensors_and_triton_alone():
    for file in KERNELS.glob("**/*.py"):
        assert not {name for name in imported(file) if name.split(".")[0] == "hypermlp"}, file


# what a new process holds after each step, one after the other
STEPS = {
    "import": "import hypermlp, hypermlp.integrations.official; hypermlp.swap_attention",
    "swap": """
from torch import nn
from hypermlp.integrations import Adapter, Host, register
class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Linear(8, 8)
class Toy(Adapter):
    def describe(self, module):
        return Host(8, 2)
register(Toy(), "Attention")
hypermlp.swap_attention(nn.Sequential(Attention()), max_lag=4)
""",
    "call": "hypermlp.HyperGLU(16, max_lag=8)(torch.randn(1, 8, 16)).sum().backward()",
    "lab": "import hypermlp.models, hypermlp.generation, hypermlp_lab.training, hypermlp_lab.cli",
}
PROGRAM = f"""
import json, sys, torch
torch.set_float32_matmul_precision("highest")
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
def settings():
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    return torch.get_float32_matmul_precision(), str(torch.get_default_dtype()), torch.get_num_threads(), tf32
before, known, found = set(sys.modules), settings(), {{}}
for name, step in {STEPS!r}.items():
    exec(step)
    found[name] = {{
        "modules": sorted(set(sys.modules) - before), "gpu": torch.cuda.is_initialized(),
        "as before": settings() == known,
    }}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def new_process() -> dict[str, dict[str, Any]]:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=300)
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


def test_importing_loads_no_kernels_and_so_builds_none(new_process):
    loaded = {name for name in new_process["import"]["modules"] if name.startswith("hypermlp_kernels")}
    assert loaded == {"hypermlp_kernels", "hypermlp_kernels.arguments"}


@pytest.mark.parametrize("step", STEPS)
def test_no_extra_is_loaded_and_no_gpu_touched(new_process, step):
    loaded = {name.split(".")[0] for name in new_process[step]["modules"]}
    assert not loaded & {"matplotlib", "transformers", "typer", "rich", "safetensors"}
    assert ("hypermlp_lab" in loaded) == (step == "lab")
    assert not new_process[step]["gpu"]


def test_importing_leaves_the_compiler_alone(new_process):
    """It takes as long to load as PyTorch."""
    assert "torch._dynamo" not in new_process["import"]["modules"]


@pytest.mark.parametrize("step", STEPS)
def test_settings_of_pytorch_stay(new_process, step):
    assert new_process[step]["as before"]
