"""Installs built distributions, each into an empty environment of its own, and tries there what a user does first.

python tools/smoke.py dist/*.whl dist/*.tar.gz
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
# run where no checkout is on the path
_TRY = """
import sys
from pathlib import Path

import hypermlp

folder = Path(hypermlp.__file__).parent
assert folder.parent.name == "site-packages", folder
assert (folder / "py.typed").exists()
surplus = {"transformers", "timm", "typer", "matplotlib", "hypermlp_lab"} & sys.modules.keys()
assert not surplus, f"import hypermlp loads {surplus}"

import hypermlp_kernels
import torch

native = Path(hypermlp_kernels.__file__).parent / "native"
assert list(native.glob("*.cpp")) and list(native.glob("*.h")), "the C++ sources are not in the distribution"
torch.manual_seed(0)
for kind in (hypermlp.HyperGLU, hypermlp.HyperMLP, hypermlp.SoftmaxAttention, hypermlp.ReLUAttention):
    layer = kind(64, max_lag=32, layer_idx=0, backend="chunked")
    x = torch.randn(2, 12, 64)
    whole = layer(x)
    whole.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    cache = hypermlp.HyperCache()
    with torch.no_grad():
        parts = [layer(piece, cache=cache) for piece in x.split([7, 1, 1, 1, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
print("hypermlp", hypermlp.__version__, "from", folder)
"""


def main(distributions: list[str]) -> None:
    """Try each of the files."""
    if not distributions:
        sys.exit(__doc__)
    for distribution in distributions:
        with tempfile.TemporaryDirectory() as folder:
            print(f"{Path(distribution).name}: installing", flush=True)
            smoke(Path(distribution).resolve(), Path(folder))


def smoke(distribution: Path, folder: Path) -> None:
    """Install ``distribution`` below ``folder`` and use it; an error names the command that failed."""
    python, command = folder / "venv" / "bin" / "python", folder / "venv" / "bin" / "hypermlp"
    pinned = ["--quiet", "--disable-pip-version-check", "-c", str(_ROOT / "constraints.txt")]

    def run(*arguments: str | Path) -> None:
        subprocess.run(list(map(str, arguments)), cwd=folder, check=True)

    run(sys.executable, "-m", "venv", folder / "venv")
    run(python, "-m", "pip", "install", *pinned, distribution)
    run(python, "-I", "-W", "error::DeprecationWarning:hypermlp", "-c", _TRY)
    run(python, "-I", "-m", "hypermlp.doctor")
    told = subprocess.run([command], cwd=folder, capture_output=True, text=True)
    if told.returncode == 0 or "pip install" not in told.stderr:
        sys.exit(f"without the extra lab the command should say what it needs, and said: {told.stdout}{told.stderr}")
    run(python, "-m", "pip", "install", *pinned, f"{distribution}[lab]")
    run(command, "--help")


if __name__ == "__main__":
    main(sys.argv[1:])
