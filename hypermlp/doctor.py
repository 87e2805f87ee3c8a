"""``python -m hypermlp.doctor``: what works here and what does not, on one screen to paste into a report.

Nothing in it names the machine, its user or their folders. Status 1 where something that should work does not.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hypermlp.installed import installed, missing_extras
from hypermlp.ops import SequenceMix, hyper_attention, native, self_check, triton
from hypermlp.ops.arguments import Needs, OperatorArgs, Options
from hypermlp.ops.attention import Backend
from hypermlp.ops.decode import Past, StepArgs
from hypermlp.ops.self_check import Errors
from hypermlp.ops.self_check_cases import backward_errors, forward_errors, mapped
from hypermlp.ops.self_check_steps import conv_errors, step_errors
from hypermlp.ops.short_conv import by_operators
from hypermlp.ops.varlen import Tokens

_PACKAGES = ("triton", "einops", "numpy", "transformers")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LENGTH = 64
_TIMED_LENGTHS = (1024, 4096, 16384)


class Line(NamedTuple):
    """One fact. ``wrong``: something that should work does not."""

    name: str
    text: str
    wrong: bool = False


def main(arguments: list[str] | None = None, show: Callable[[str], None] = print) -> int:
    """Print all facts; status 1 where something that should work does not."""
    parser = argparse.ArgumentParser(prog="python -m hypermlp.doctor", description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="for timing on a GPU, 0 for none (%(default)s)")
    options = parser.parse_args(arguments)
    wrong = False
    for line in lines(options.seconds):
        wrong |= line.wrong
        show(f"{'WRONG ' if line.wrong else ''}{line.name}: {line.text}")
    show("something that should work here does not: please report this" if wrong else "all that can work here does")
    return int(wrong)


def lines(seconds: float = 20.0) -> Iterator[Line]:
    """All facts, as they are found."""
    yield from _versions()
    yield from _devices()
    yield from _backends()
    for dtype in _DTYPES:
        yield from _kernels(_device(), dtype)
    if _device() == "cuda" and seconds > 0:
        yield from _timing(seconds)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _versions() -> Iterator[Line]:
    from hypermlp import __version__

    packages = " ".join(f"{name} {installed(name)}" for name in _PACKAGES)
    system = f"{platform.system()} {platform.machine()}"
    yield Line("hypermlp", f"{__version__}, Python {platform.python_version()}, {system}")
    yield Line("packages", f"torch {torch.__version__} {packages}")
    yield Line("extras", missing_extras())


def _devices() -> Iterator[Line]:
    level = torch.backends.cpu.get_cpu_capability()
    yield Line("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of PyTorch, {level}")
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        yield Line("gpu", "none that PyTorch can use" + ("" if built else ", which was built without"))
        return
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        size, platform_of = found.total_memory / 2**30, torch.version.hip or torch.version.cuda
        yield Line(
            f"gpu {index}",
            f"{found.name}, capability {found.major}.{found.minor}, {found.multi_processor_count} multiprocessors, "
            f"{size:.0f} GiB, CUDA or HIP {platform_of}",
        )


def _backends() -> Iterator[Line]:
    """What each path can do, by trying it on few tokens."""
    device = _device()
    yield Line("C++ compiler", _compiler())
    yield _tried("chunked", device)
    if reason := native.unavailable(_probe("cpu", torch.float32)):
        # a compiler that is there should do
        yield Line("native", f"cannot run: {_without_paths(reason)}", wrong=_compiler() != "none")
    else:
        yield _tried("native", "cpu")
    if reason := triton.unavailable(_probe(device, torch.float32)):
        # without a GPU nothing is missing
        yield Line("triton", f"cannot run: {_without_paths(reason)}", wrong=device == "cuda")
        return
    yield Line("triton", f"judged below, on {device}" + ("" if device == "cuda" else " in Triton's interpreter"))
    if reason := triton.unavailable(_probe(device, torch.bfloat16)):
        yield Line("triton in bfloat16", f"cannot run: {reason}", wrong=device == "cuda")


def _compiler() -> str:
    from hypermlp_kernels.native.build import find_compiler

    found = find_compiler()
    return "none" if found is None else Path(found).name


def _tried(backend: Backend, device: str) -> Line:
    x = _sample(device, torch.float32, "glu")
    try:
        found = _results(x, backend)
        exact = _results(mapped(x, Tensor.double), "reference")
    except Exception as error:  # whatever stops it is what is asked for
        return Line(backend, _without_paths(f"{type(error).__name__}: {error}"), wrong=True)
    worst = max(float((y.double() - z).norm() / z.norm()) for y, z in zip(found, exact, strict=True))
    return Line(backend, f"forward and backward on {device}, relative error {worst:.1e}", wrong=not worst < 1e-4)


def _kernels(device: str, dtype: torch.dtype) -> Iterator[Line]:
    """The self-check of every family in ``dtype``."""
    if triton.unavailable(_probe(device, dtype)):
        return
    name = str(dtype).removeprefix("torch.")
    needs = Needs.of([True] * 11)
    for selection in ("glu", "relu"):
        x = _sample(device, dtype, selection)
        yield _judged(f"{name} {selection} forward", x.q, lambda x=x: forward_errors(x))  # type: ignore[misc]
        yield _judged(f"{name} {selection} backward", x.q, lambda x=x: backward_errors(x, needs))  # type: ignore[misc]
        yield _judged(f"{name} {selection} decode", x.q, lambda x=x: step_errors(_step(x)))  # type: ignore[misc]
    taps = torch.ones(64, 4, device=device, dtype=dtype)
    rows = torch.ones(1, _LENGTH, 64, device=device, dtype=dtype)
    yield _judged(
        f"{name} short convolution", rows, lambda: conv_errors(rows, taps, False, 0, (True, True), by_operators)
    )


def _judged(name: str, x: Tensor, check: Callable[[], Errors]) -> Line:
    start = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            errors = self_check.alone(check, x.device)
    except Exception as error:  # whatever a compiler or a driver raises
        return Line(f"kernels {name}", _without_paths(f"{type(error).__name__}: {error}"), wrong=True)
    worst = max(errors, key=lambda key: errors[key].made / max(errors[key].allowed, 1e-300))
    text = f"at worst {errors[worst].made:.1e} of {errors[worst].allowed:.1e} allowed ({worst})"
    wrong = self_check.describe_wrong(errors)
    return Line(f"kernels {name}", f"{wrong or text}, {time.monotonic() - start:.1f} s", bool(wrong))


def _sample(
    device: str, dtype: torch.dtype, selection: str, length: int = _LENGTH, qk_width: int = 16, v_width: int = 64
) -> OperatorArgs:
    """A call like a small layer's of two heads."""
    rng = torch.Generator().manual_seed(0)
    maps = 4 if selection == "glu" else 2

    def normal(*shape: int) -> Tensor:
        return (0.3 * torch.randn(shape, generator=rng)).to(device, dtype)

    def mixing(heads: int) -> SequenceMix:
        down, up = (normal(heads, length, 16) for _ in range(2))
        return SequenceMix(normal(heads, length), down, up, normal(1, length, heads, 16))

    q, k, v = normal(1, length, maps, qk_width), normal(1, length, maps, qk_width), normal(1, length, 2, v_width)
    options = Options(selection, True, 1e-12, True, "lag", length)
    return OperatorArgs(q, k, v, mixing(maps), mixing(2), Tokens(), options)


def _step(x: OperatorArgs) -> StepArgs:
    """One token after a cache that holds the others as layers do."""
    routing, readout = (mix._replace(core=mix.core[:, -1]) for mix in (x.routing_mix, x.readout_mix))  # type: ignore[index]
    keys, values = x.k[0].permute(1, 2, 0).contiguous(), x.v[0].transpose(0, 1).contiguous()
    return StepArgs(x.q[:, -1].flatten(1), Past([keys], [values], None), routing, readout, x.options)


def _results(x: OperatorArgs, backend: Backend) -> list[Tensor]:
    """The output and every gradient of a HyperGLU call."""
    x = mapped(x, lambda y: y.detach().requires_grad_())
    o = hyper_attention(x.q, x.k, x.v, x.routing_mix, x.readout_mix, backend=backend)
    return [o.detach(), *torch.autograd.grad(o.square().sum(), [y for y in x.tensors if y is not None])]


def _probe(device: str, dtype: torch.dtype) -> Tensor:
    return torch.empty(1, device=device, dtype=dtype)


def _timing(seconds: float, device: str = "cuda") -> Iterator[Line]:
    """What ``backend="auto"`` takes beside PyTorch's attention of the same width, forward and with backward."""
    for length in _TIMED_LENGTHS:
        for backward in (False, True):
            calls = {"hyperglu": _hyper_call(device, length, backward), "sdpa": _sdpa_call(device, length, backward)}
            try:
                times = {name: _median_ms(call, seconds / (4 * len(_TIMED_LENGTHS))) for name, call in calls.items()}
            except torch.OutOfMemoryError:
                yield Line(f"T = {length}", "out of memory")
                return
            what = "forward+backward" if backward else "forward"
            yield Line(
                f"T = {length} {what}",
                f"HyperGLU {times['hyperglu']:.3f} ms, SDPA {times['sdpa']:.3f} ms (1024 channels, bfloat16)",
            )


def _hyper_call(device: str, length: int, backward: bool) -> Callable[[], object]:
    sample = _sample(device, torch.bfloat16, "glu", length, qk_width=64, v_width=512)
    x = mapped(sample, lambda y: y.requires_grad_(backward))
    leaves = [y for y in x.tensors if y is not None]
    return _call(lambda: hyper_attention(x.q, x.k, x.v, x.routing_mix, x.readout_mix), leaves, backward)


def _sdpa_call(device: str, length: int, backward: bool) -> Callable[[], object]:
    q, k, v = (
        torch.randn(1, 16, length, 64, device=device, dtype=torch.bfloat16, requires_grad=backward) for _ in range(3)
    )
    return _call(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), [q, k, v], backward)


def _call(forward: Callable[[], Tensor], leaves: list[Tensor], backward: bool) -> Callable[[], object]:
    if not backward:
        return forward
    weight = torch.randn_like(forward())
    return lambda: torch.autograd.grad(forward(), leaves, weight)


def _median_ms(call: Callable[[], object], seconds: float) -> float:
    call()
    torch.cuda.synchronize()
    times: list[float] = []
    end = time.monotonic() + seconds
    while len(times) < 3 or (time.monotonic() < end and len(times) < 100):
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def _without_paths(text: str) -> str:
    """One line of ``text``, with the last part of each path alone: the rest may name a user."""
    return re.sub(r"(?:~|[A-Za-z]:)?(?:[/\\][\w.@+~-]+)+[/\\]([\w.@+~-]+)", r"\1", " ".join(text.split()))[:400]


if __name__ == "__main__":
    sys.exit(main())
