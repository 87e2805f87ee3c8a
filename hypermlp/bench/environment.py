"""What a measurement was made on, without anything that names the machine or its owner."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


def describe(device: str = "cpu") -> dict[str, Any]:
    """Processor, accelerator, versions and, in a checkout, the commit."""
    from hypermlp import __version__

    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "accelerator": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "hypermlp": __version__,
        "commit": _commit(),
    }


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
