"""Count the bytes that each part of one layer reads and writes in a training step, without running it.

    python tools/kernels/traffic.py

Every operator that PyTorch would launch in eager mode counts its inputs and outputs once. That is the least it
could move: what a kernel reads twice, or keeps to itself, is not seen. Nothing is measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

from hypermlp.layers import AttentionLayer  # noqa: E402
from hypermlp.layers.feature_mixing import GateProjection, Gates  # noqa: E402
from hypermlp.ops.library import PATHS  # noqa: E402
from hypermlp.ops.varlen import ALL_TOKENS  # noqa: E402
from hypermlp_lab.bench.layers import LayerCase, hyperglu, softmax_wide  # noqa: E402

# these look at the shape of their input, or leave their output unwritten
_SHAPE_ALONE = ("new_empty", "empty_like", "new_zeros", "zeros_like", "new_ones", "ones_like", "full_like", "new_full")
_UNWRITTEN = ("empty", "new_empty", "empty_like", "empty_strided")


@dataclass(frozen=True)
class Traffic:
    """Bytes read and written by a forward and by its backward."""

    forward: int = 0
    backward: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.forward + other.forward, self.backward + other.backward)

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(self.forward - other.forward, self.backward - other.backward)


class ByteCounter(TorchDispatchMode):
    """Adds up what operators read and write, in ``total`` and by name in ``by_operator``."""

    def __init__(self) -> None:
        super().__init__()
        self.by_operator: dict[str, int] = {}

    @property
    def total(self) -> int:
        return sum(self.by_operator.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        namespace, name = func._schema.name.split("::")
        if namespace != "prim" and not func.is_view and name != "_unsafe_view":
            read = 0 if name in _SHAPE_ALONE else _bytes((args, kwargs))
            written = 0 if name in _UNWRITTEN else _bytes(out)
            self.by_operator[name] = self.by_operator.get(name, 0) + read + written
        return out


def _bytes(tree: Any) -> int:
    """Of all tensors; a dimension that was expanded is in memory once."""
    return sum(
        x.element_size() * prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride)
        for x in tree_leaves(tree)
        if isinstance(x, Tensor)
    )


def count(function: Callable[..., Any], inputs: Sequence[Tensor], parameters: Sequence[Tensor] = ()) -> Traffic:
    """Of ``function(*inputs)`` and of its gradient with respect to the inputs and the parameters it uses."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    with ByteCounter() as forward:
        out = [x for x in tree_leaves(function(*inputs)) if isinstance(x, Tensor)]
    grads = [torch.empty_like(x) for x in out]
    with ByteCounter() as backward:
        torch.autograd.grad(out, [*inputs, *parameters], grads, allow_unused=True)
    return Traffic(forward.total, backward.total)


def parts(layer: AttentionLayer, x: Tensor) -> dict[str, Traffic]:
    """Each part of the layer alone; ``rest`` is what the whole layer moves besides, such as sums of gradients."""
    q, k, v, gates = layer.streams(x)
    o = layer.attend(q, k, v, gates, ALL_TOKENS)
    names = [name for name, y in gates._asdict().items() if y is not None]

    def attend(q: Tensor, k: Tensor, v: Tensor, *streams: Tensor) -> Tensor:
        return layer.attend(q, k, v, Gates(**dict(zip(names, streams, strict=True))), ALL_TOKENS)

    calls: dict[str, list[tuple[Callable[..., Any], list[Tensor]]]] = {
        "projections": [(linear, [x]) for linear in (layer.q_proj, layer.k_proj, layer.v_proj)],
        "convolutions": [(partial(conv, backend=layer.backend), [x]) for conv in (layer.k_conv, layer.v_conv) if conv],
        "gates": [],
        "operator": [(attend, [q, k, v, *(y for y in gates if y is not None)])],
    }
    calls["projections"].append((layer.o_proj, [o.flatten(-2)]))
    if layer.gate is not None:
        calls["projections"].append((layer.gate.proj, [x]))
        alone = GateProjection(1, layer.gate.widths, layer.gate.activation)
        alone.proj = torch.nn.Identity()  # type: ignore[assignment]
        calls["gates"].append((alone, [layer.gate.proj(x)]))
    for y, gate in ((q, gates.query), (o, gates.output)):
        if gate is not None:
            calls["gates"].append((torch.mul, [y.flatten(-2), gate]))

    parameters = list(layer.parameters())
    found = {
        name: sum((count(function, inputs, parameters) for function, inputs in some), Traffic())
        for name, some in calls.items()
    }
    whole = count(layer, [x], parameters)
    found["rest"] = whole - sum(found.values(), Traffic())
    return found | {"whole layer": whole}


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Tensors have no memory, and the kernels would run if anything did."""
    with FakeTensorMode(), mock.patch.dict(PATHS, triton=PATHS["triton"]._replace(unavailable=lambda q: None)):
        yield


def layer_traffic(build: Callable[[LayerCase], AttentionLayer], case: LayerCase) -> dict[str, Traffic]:
    """:func:`parts` of a layer of which no number is ever computed."""
    with pretended_gpu():
        return parts(build(case), torch.empty(case.batch, case.length, case.hidden_size, dtype=case.dtype))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 4), ("length", 4096), ("hidden-size", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")
    options = parser.parse_args()
    case = LayerCase(length=options.length, hidden_size=options.hidden_size, batch=options.batch, dtype=torch.bfloat16)
    print("| layer | part | forward MB | backward MB | sum MB |\n| --- | --- | --- | --- | --- |")
    layers = {"HyperGLU": hyperglu("chunked"), "HyperGLU, triton": hyperglu("triton"), "softmax": softmax_wide}
    for name, build in layers.items():
        for part, traffic in layer_traffic(build, case).items():
            both = traffic.forward + traffic.backward
            sizes = (f"{size / 1e6:.0f}" for size in (traffic.forward, traffic.backward, both))
            print(f"| {name} | {part} | " + " | ".join(sizes) + " |")


if __name__ == "__main__":
    main()
