"""Compile the kernels for a GPU that is not here, run them in the emulator, and compare with float64.

    python tools/kernels/emulate.py --arch sm_90 --path "glu bf16" --tile 64x32x32 --warps 4 --length 70 --backward

Prints errors, races, bank conflicts and instruction counts; status 1 where something is wrong. A faulting
access ends it with its instruction. ``emulator/__init__.py`` says what this cannot show.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(Path(__file__).parent)]

from emulator.device import Launch, emulated_gpu  # noqa: E402

from hypermlp.ops import SequenceMix  # noqa: E402
from hypermlp.ops.reference import hyper_attention_reference  # noqa: E402
from hypermlp_kernels import launch, launch_backward  # noqa: E402
from hypermlp_kernels.arguments import Needs, Options  # noqa: E402
from hypermlp_kernels.backward_tiles import BackwardTile  # noqa: E402
from hypermlp_kernels.tiles import KERNELS, Tile  # noqa: E402

PATHS: dict[str, dict[str, Any]] = {
    "glu bf16": {},
    "relu bf16": {"selection": "relu"},
    "glu fp16": {"dtype": torch.float16},
    "glu tf32": {"dtype": torch.float32, "allow_tf32": True},
    "glu fp32": {"dtype": torch.float32},
    "position bf16": {"layout": "position"},
}
# of the largest value: that of the interpreter's checks
TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3, torch.float32: 3e-6}
# three bits more than bfloat16, but the rest is cut off where bfloat16 rounds
_TF32_TOLERANCE = 2 * TOLERANCE[torch.bfloat16] / 8


class Result(NamedTuple):
    """Largest error of the output or of a gradient, what is allowed, and the launches that made it."""

    error: float
    allowed: float
    launches: list[Launch]

    @property
    def wrong(self) -> bool:
        # written so that a NaN is wrong
        return not self.error <= self.allowed or any(one.mistakes for one in self.launches)


def emulate(
    arch: str, tile: Tile, *, length: int = 70, heads: int = 1, width: int = 32, values: int = 32, rank: int = 16,
    selection: str = "glu", layout: str = "lag", dtype: torch.dtype = torch.bfloat16, allow_tf32: bool = False,
    window: int | None = None, masked: bool = False, backward: bool = False, span: int | None = None,
) -> Result:  # fmt: skip
    """One forward on random inputs, with ``tile`` for every kernel; with ``backward`` the gradients are compared."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return 0.5 * torch.randn(*shape, generator=rng, dtype=torch.float64)

    rows, maps = window or length, heads * (2 if selection == "glu" else 1)
    mask = None
    if masked:
        mask = torch.ones(1, length, dtype=torch.bool)
        mask[:, :3] = mask[:, length // 2] = False
    q, k, v = (normal(1, length, *shape).to(dtype) for shape in ((maps, width), (maps, width), (heads, values)))
    mixes = []
    for count in (maps, heads):
        tables = [0.2 * normal(count, rows), *(0.4 * normal(count, rows, rank) for _ in range(2))]
        gate = normal(1, length, count, rank).sigmoid()
        mixes.append([x.to(dtype) for x in (*tables, gate)])
    if mask is not None:
        for x in (q, k, v, mixes[0][3], mixes[1][3]):
            x[~mask] = 0
    inputs = [q, k, v, *mixes[0], *mixes[1]]
    options = {"selection": selection, "layout": layout, "max_lag": rows, "attention_mask": mask}
    switches = Options(selection, True, 1e-12, True, layout, rows)
    given: dict[str, Any] = {"attention_mask": mask, "allow_tf32": allow_tf32}
    tolerance = _TF32_TOLERANCE if allow_tf32 else TOLERANCE[dtype]
    streams = (q, k, v, *(SequenceMix(*mix, True) for mix in mixes))
    grad_o = normal(*v.shape)
    with emulated_gpu(arch) as launches:
        o, *statistics = launch.forward(*streams, switches, **given, chosen=dict.fromkeys(KERNELS, tile))
        if backward:
            gradients = launch_backward.backward(
                grad_o.to(o.dtype), o, tuple(statistics), *streams, Needs.of([True] * len(inputs)), switches, **given,
                tile=BackwardTile(tile.rows, tile.keys, 2 * tile.keys, 16, tile.values, tile.warps, tile.stages),
                span=span,
            )  # fmt: skip
    expected, *expected_gradients = _by_reference(inputs, grad_o, torch.float64, **options)
    error = float((o.double() - expected).abs().max() / expected.abs().max())
    judged = [(error, tolerance)]
    if backward:
        # where a gate beside zero rounds to the other side its gradient is another one: in PyTorch's bfloat16 too
        _, *rounded = _by_reference(inputs, grad_o, torch.bfloat16, **options)
        share = tolerance / TOLERANCE[torch.bfloat16]
        for x, y, z in zip(gradients.flat, expected_gradients, rounded, strict=True):
            judged.append((float((x - y).norm() / y.norm()), 2 * share * float((z - y).norm() / y.norm())))
    return Result(*max(judged, key=lambda one: one[0] / one[1]), launches)


def _by_reference(
    inputs: list[torch.Tensor], grad_o: torch.Tensor, compute_dtype: torch.dtype, **options: Any
) -> list[torch.Tensor]:
    """Output and gradients by the equations, in float64."""
    leaves = [x.to(compute_dtype).requires_grad_() for x in inputs]
    o = hyper_attention_reference(
        *leaves[:3], SequenceMix(*leaves[3:7]), SequenceMix(*leaves[7:]),
        norm=True, eps=1e-12, causal=True, compute_dtype=compute_dtype, **options,
    )  # fmt: skip
    return [x.detach().double() for x in (o, *torch.autograd.grad(o, leaves, grad_o.to(o.dtype)))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sm_90", choices=["sm_80", "sm_90"])
    parser.add_argument("--path", default="glu bf16", choices=list(PATHS))
    parser.add_argument("--tile", default="64x32x32", help="queries x keys x values (default: %(default)s)")
    parser.add_argument("--warps", type=int, default=4)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--window", type=int, help="rows of the tables; as many as tokens by default")
    parser.add_argument("--masked", action="store_true", help="with padding and a hole")
    parser.add_argument("--backward", action="store_true", help="the gradients too")
    parser.add_argument("--span", type=int, help="key tiles after which the backward splits rows")
    for name, default in (("length", 70), ("heads", 1), ("width", 32), ("values", 32), ("rank", 16)):
        parser.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")
    options = vars(parser.parse_args())
    arch, path = options.pop("arch"), options.pop("path")
    shape = tuple(int(size) for size in options.pop("tile").split("x"))
    tile = Tile(*shape, options.pop("warps"), options.pop("stages"))
    start = time.monotonic()
    result = emulate(arch, tile, **options, **PATHS[path])
    for one in result.launches:
        print(one.name)
        for what, count in sorted(one.found.items()):
            if count or what in one.mistakes:
                print(f"    {what}: {count}" + ("   WRONG" if what in one.mistakes else ""))
    print(f"error {result.error:.1e} of the largest value, {result.allowed:.1e} allowed")
    print("WRONG" if result.wrong else "nothing wrong found", f"({time.monotonic() - start:.0f} s)")
    return result.wrong


if __name__ == "__main__":
    sys.exit(main())
