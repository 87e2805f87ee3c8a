"""AddressSanitizer and UBSan over the native kernels, with guarded gaps between the parts of their workspace."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hypermlp_kernels.native import build

_ROOT = Path(__file__).parents[3]


def sanitizers(compiler: str) -> str | None:
    """The run-time libraries to load before Python, or None where the compiler has none."""
    found = []
    for name in ("libasan.so", "libubsan.so"):
        done = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        if not os.path.isabs(done.stdout.strip()):
            return None
        found.append(done.stdout.strip())
    return " ".join(found)


def run(program: list[str], cache: Path) -> subprocess.CompletedProcess[str]:
    compiler = build.find_compiler()
    libraries = None if compiler is None else sanitizers(compiler)
    if libraries is None:
        pytest.skip("needs a C++ compiler with its sanitizers' libraries")
    environment = os.environ | {
        "LD_PRELOAD": libraries,
        "ASAN_OPTIONS": "detect_leaks=0",
        "XDG_CACHE_HOME": str(cache),
        "PYTHONPATH": os.pathsep.join([str(_ROOT), *(path for path in sys.path if path)]),
    }
    return subprocess.run(program, env=environment, capture_output=True, text=True, timeout=1800, cwd=_ROOT)


@pytest.mark.slow
def test_awkward_shapes(tmp_path):
    done = run([sys.executable, "-m", "tests.kernels.native.sanitized"], tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "sanitized"


_OVERRUN = """
from pathlib import Path
import shutil, sys
from hypermlp_kernels.native import build
from tests.kernels.native import sanitized
from tests.helpers import make_case
import torch
sources = Path(sys.argv[1])
shutil.copytree(build._SOURCES, sources)
text = (sources / "forward.cpp").read_text()
part = "norms = space.take(TILE * BLOCK)"
assert part in text
(sources / "forward.cpp").write_text(text.replace(part, "norms = space.take(TILE * BLOCK - BLOCK)"))
build._SOURCES = sources
build._FLAGS = (*build._FLAGS, *sanitized._SANITIZED)
make_case(length=30, dtype=torch.float32).run("native")
"""


@pytest.mark.slow
def test_a_part_of_the_workspace_that_is_too_small_is_found(tmp_path):
    done = run([sys.executable, "-c", _OVERRUN, str(tmp_path / "sources")], tmp_path)
    assert done.returncode != 0
    assert "use-after-poison" in done.stderr
