"""Packages that may not be installed, and a torchvision that does not fit the PyTorch beside it."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

# what torchvision has rules for as soon as it is imported, whether its operators could be loaded or not
_AT_IMPORT = ("nms", "qnms")
_declared: list[torch.library.Library] = []


def package(name: str) -> Any:
    """A package that may not be there, or not fit the PyTorch that is: torchvision says so with RuntimeError."""
    _let_torchvision_in()
    try:
        return import_module(name)
    except (ImportError, RuntimeError) as reason:
        pytest.skip(f"needs {name}: {reason}", allow_module_level=True)


def _let_torchvision_in() -> None:
    """Declares the operators for lack of which a torchvision built for CUDA cannot be imported beside PyTorch for CPUs.

    They find boxes in pictures. The vision transformers of the tests call none of them: declared is enough, and called
    they would be an error.
    """
    spec = None if _declared else find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    try:
        for library in Path(spec.origin).parent.glob("_C.*"):
            torch.ops.load_library(library)
    except (ImportError, OSError):
        lacking = torch.library.Library("torchvision", "FRAGMENT")
        for name in _AT_IMPORT:
            lacking.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(lacking)  # operators live as long as their library
