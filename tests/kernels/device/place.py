"""Where these tests run the kernels, and the interpreter's cases as inputs there.

On a GPU; with ``TRITON_INTERPRET=1`` set before triton is imported in the interpreter, on the CPU, which
shows that the tests themselves work.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed on this platform")
sys.path.insert(0, str(Path(__file__).parents[1] / "interpreted"))

import gradients
from cases import CASES, TOLERANCE, Case, error

from hypermlp_kernels import launch
from tests.helpers import Case as OperatorCase
from tests.helpers import error as largest_error
from tests.helpers import euclidean_error

__all__ = [
    "CASES", "DEVICE", "DTYPES", "ON_GPU", "TOLERANCE", "Case", "error", "measure_of", "moved", "operator_case",
]  # fmt: skip

ON_GPU = torch.cuda.is_available() and not launch.interpreted()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

if launch.interpreted():
    import repairs

    repairs.repair()
elif not ON_GPU:
    pytest.skip("needs a GPU (or TRITON_INTERPRET=1 to try the tests themselves, slowly)", allow_module_level=True)


def operator_case(case: Case, dtype: torch.dtype) -> tuple[OperatorCase, dict[str, Any]]:
    """The case as named tensors of ``dtype`` where the kernels run, and the arguments that carry no gradient."""
    tensors = dict(zip(gradients.NAMES, gradients.inputs(case), strict=True))
    tensors = {name: x for name, x in tensors.items() if x is not None}
    has_tables = any(name.endswith(("diag", "down")) for name in tensors)
    options = {
        "selection": case.selection, "norm": case.norm, "eps": 1e-12, "causal": case.causal, "layout": case.layout,
        "max_lag": None if has_tables else case.window,
        "routing_identity": case.mixes[0].identity, "readout_identity": case.mixes[1].identity,
    }  # fmt: skip
    hidden = {"attention_mask": case.mask_tensor, "cu_seqlens": case.cu_seqlens}
    hidden = {name: None if x is None else x.to(DEVICE) for name, x in hidden.items()}
    return OperatorCase({name: x.to(DEVICE, dtype) for name, x in tensors.items()}, options), hidden


def moved(case: Case, dtype: torch.dtype) -> Case:
    """The case there in ``dtype``, with the kernels' own tiles: the interpreter's are too small for a GPU."""
    there = case.to(DEVICE)
    there.q, there.k, there.v = (x.to(dtype) for x in (there.q, there.k, there.v))
    there.mixes = [
        mix._replace(**{name: x.to(dtype) for name, x in mix._asdict().items() if isinstance(x, torch.Tensor)})
        for mix in there.mixes
    ]
    there.tile = None
    return there


def measure_of(dtype: torch.dtype) -> Callable[[torch.Tensor, torch.Tensor], float]:
    """Of the error of gradients: the largest, but over the whole tensor in half precision.

    The selection's derivative jumps where a score changes sign. Scores of half precision do that here and
    there, in any path and each at other places, and each time one row's gradient is off by far more
    than rounding.
    """
    return largest_error if dtype == torch.float32 else euclidean_error
