"""What a measurement was made on, without anything that names the machine or its owner."""

from __future__ import annotations

import os
import platform
import subprocess
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from hypermlp.ops import native

_LANGUAGES = (".py", ".cpp", ".h")


def describe(device: str = "cpu") -> dict[str, Any]:
    """Processor, accelerator, versions and, in a checkout, the commit."""
    from hypermlp import __version__

    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "accelerator": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None,
        "accelerator_details": _accelerator_details(device) if torch.device(device).type == "cuda" else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": _installed("triton"),
        "native": native.unavailable(torch.empty(0)) or "built",
        "hypermlp": __version__,
        "commit": _commit(),
        "sources": _sources(),
    }


def _accelerator_details(device: str) -> dict[str, Any]:
    found = torch.cuda.get_device_properties(device)
    return {
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
    }


def _installed(package: str) -> str | None:
    try:
        return str(version(package))
    except PackageNotFoundError:
        return None


def _sources() -> str:
    """Digest of all source that is measured or measures: names the code where there is no commit to name."""
    digest = sha256()
    for folder in _source_folders():
        for file in sorted(file for file in folder.rglob("*") if file.suffix in _LANGUAGES):
            digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def _source_folders() -> list[Path]:
    specs = [find_spec(package) for package in ("hypermlp", "hypermlp_kernels", "hypermlp_lab")]
    return [Path(folder) for spec in specs if spec for folder in spec.submodule_search_locations or ()]


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    """Commit of the checkout this package lies in, ``-dirty`` with changes; None elsewhere."""
    package = Path(__file__).resolve().parent

    def git(*command: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(package), *command], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # an installed copy may lie in some other project's checkout, which does not track it
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return git("describe", "--always", "--dirty", "--exclude=*")
