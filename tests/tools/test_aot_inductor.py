"""A language model compiled ahead of time by AOTInductor, and opened in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import assert_close
from tests.tools.models import language_model, tokens

# the whole model is compiled as C++
pytestmark = pytest.mark.slow

OPENED = """
import sys, torch
{first}
package, ids, out = sys.argv[1:]
model = torch._inductor.aoti_load_package(package)
torch.save([model(each) for each in torch.load(ids)], out)
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {0: torch.export.Dim("batch", min=2, max=8), 1: torch.export.Dim("length", min=2, max=12)}
    program = torch.export.export(language_model().eval(), (tokens(3, 9),), dynamic_shapes=(sizes,))
    made: Any = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path_factory.mktemp("aot") / "model.pt2")
    )
    return Path(made)


def opened(package: Path, folder: Path, first: str) -> subprocess.CompletedProcess[str]:
    code = OPENED.format(first=first)
    files = [str(file) for file in (package, folder / "ids.pt", folder / "out.pt")]
    return subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, timeout=300)


def test_other_batches_and_lengths_give_the_eager_logits(package: Path, tmp_path: Path) -> None:
    ids = [tokens(2, 5), tokens(4, 12), tokens(3, 2)]
    torch.save(ids, tmp_path / "ids.pt")
    ended = opened(package, tmp_path, "import hypermlp")
    assert ended.returncode == 0, ended.stderr
    model = language_model().eval()
    with torch.no_grad():
        expected = {str(i): model(each) for i, each in enumerate(ids)}
    assert_close({str(i): each for i, each in enumerate(torch.load(tmp_path / "out.pt"))}, expected, 1e-9)


def test_the_library_has_to_be_imported_first(package: Path, tmp_path: Path) -> None:
    torch.save([tokens(2, 5)], tmp_path / "ids.pt")
    ended = opened(package, tmp_path, "")
    assert ended.returncode != 0
    assert "schema for hypermlp::" in ended.stderr
