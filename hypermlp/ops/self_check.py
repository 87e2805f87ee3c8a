"""Whether kernels may be trusted: a family is checked once, on small inputs, before ``backend="auto"`` takes it.

A family is what one compiled kernel serves. What the check found holds for the process; nothing is written.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from hypermlp.ops.modes import captured, on_device

_DRAWS = 4


class Family(NamedTuple):
    """Calls that run the same compiled kernels on the same device.

    Attributes:
        kernels: ``"forward"``, ``"backward"``, ``"decode"`` or ``"short convolution"``.
        traits: all else that they are compiled for, so never the number of tokens.
    """

    kernels: str
    device: torch.device
    dtype: torch.dtype
    traits: tuple[Hashable, ...]

    def __str__(self) -> str:
        return f"{self.kernels} in {str(self.dtype).removeprefix('torch.')} on {self.device}"


class Judged(NamedTuple):
    """The error of one result, and the most that it may be."""

    made: float
    allowed: float

    @property
    def right(self) -> bool:
        return math.isfinite(self.allowed) and self.made <= self.allowed  # of NaN neither is true


Errors = dict[str, Judged]
Measure = Callable[[Tensor, Tensor], float]
# from a precision to compute in and a change of the inputs to all results by name
Change = Callable[[Tensor], Tensor]
Evaluate = Callable[[torch.dtype, Change], Mapping[str, Tensor]]

_VERDICTS: dict[Family, bool] = {}
_WARNED: set[tuple[str, Family]] = set()
_LOCK = threading.Lock()


def trusted(family: Family, check: Callable[[], Errors]) -> bool:
    """Whether the kernels of ``family`` passed their check, which is made now if it has not been.

    Not while a CUDA graph is recorded, which would keep what the check launches: there they are trusted if they
    were before.
    """
    known = _VERDICTS.get(family)
    if known is not None:
        return known
    if captured(family.device):
        _warn_once(
            "capture", family,
            f"backend='auto' takes the chunked path in this CUDA graph: the kernels for {family} were not checked "
            "before it was recorded, and in it they cannot be. Call once with such inputs first, as a warm-up does: "
            "the chunked path looks at its inputs, which CUDA refuses while it records",
        )  # fmt: skip
        return False
    with _LOCK:
        if family in _VERDICTS:
            return _VERDICTS[family]
        try:
            wrong = alone(check, family.device)
        except torch.OutOfMemoryError:
            # says nothing about the kernels: tried again
            _warn_once("memory", family, f"backend='auto' takes the chunked path: no memory to check {family}")
            return False
        except Exception as error:  # whatever a compiler or a driver raises
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            _require_context(family, reason)
        else:
            reason = describe_wrong(wrong)
        if reason:
            _warn_once("wrong", family, _message(family, reason))
        _VERDICTS[family] = not reason
    return _VERDICTS[family]


def describe_wrong(errors: Errors) -> str:
    """What is out of bounds; empty if nothing is."""
    found = (f"{name} is off by {x.made:.2g}, allowed {x.allowed:.2g}" for name, x in errors.items() if not x.right)
    return "; ".join(found) if errors else "nothing was checked"


def alone(check: Callable[[], Errors], device: torch.device) -> Errors:
    """``check`` in a thread of its own, which none of the caller's modes reach: autocast, inference, dispatch, streams.

    Nothing in it may need autograd on a device: the thread that serves it there may be the one that waits.
    """

    def run() -> Errors:
        with on_device(device):
            return check()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def judge(found: Mapping[str, Tensor], evaluate: Evaluate, precision: torch.dtype, measure: Measure) -> Errors:
    """The library's rule: at most twice the error that the plain equations make in the same precision.

    Both are judged against float64. To that come one rounding of the result, and what a rounding of the inputs to
    float32 does to it, at worst of a few draws: where a row nearly cancels no path can do better.

    Args:
        found: what is judged, by name.
        evaluate: the plain equations.
        precision: in which to compute them for comparison.
        measure: of the difference of two tensors.
    """
    truth = evaluate(torch.float64, torch.Tensor.double)
    plain = evaluate(precision, lambda x: x)
    rng = torch.Generator().manual_seed(3)

    def moved(x: Tensor) -> Tensor:
        noise = 2 * torch.rand(x.shape, generator=rng, dtype=torch.float64) - 1
        return x.double() * (1 + torch.finfo(torch.float32).eps * noise)

    draws = [evaluate(torch.float64, moved) for _ in range(_DRAWS)]
    errors = {}
    for name, x in found.items():
        if x.shape != truth[name].shape:
            raise RuntimeError(f"{name} has shape {tuple(x.shape)} and not {tuple(truth[name].shape)}")
        if not x.numel():
            continue
        rounding = torch.finfo(x.dtype).eps * measure(truth[name], torch.zeros_like(truth[name]))
        rounding += max(measure(draw[name], truth[name]) for draw in draws)
        errors[name] = Judged(measure(x, truth[name]), 2 * measure(plain[name], truth[name]) + rounding)
    return errors


def largest(x: Tensor, y: Tensor) -> float:
    """Difference of the two at worst."""
    return float((x.double() - y.double()).abs().max())


def euclidean(x: Tensor, y: Tensor) -> float:
    """Length of their difference."""
    return float((x.double() - y.double()).norm())


def _message(family: Family, reason: str) -> str:
    return (
        f"backend='auto' takes the chunked path, which is slower, instead of the GPU kernels for {family}: they did "
        f"not pass their self-check ({reason}). Results stay right. Please report this with the output of "
        "`python -m hypermlp.doctor`; backend='triton' takes them all the same, backend='chunked' ends this warning"
    )


def _require_context(family: Family, reason: str) -> None:
    """RuntimeError where the error has ended the device's context: then no path can go on."""
    if family.device.type != "cuda":
        return
    try:
        torch.zeros(1, device=family.device).item()
    except RuntimeError as error:
        raise RuntimeError(
            f"the self-check of the GPU kernels for {family} has ended the CUDA context ({reason}): start again with "
            "backend='chunked', and please report this with the output of `python -m hypermlp.doctor`"
        ) from error


def _warn_once(kind: str, family: Family, message: str) -> None:
    if (kind, family) not in _WARNED:
        _WARNED.add((kind, family))
        warnings.warn(message, RuntimeWarning, stacklevel=4)
