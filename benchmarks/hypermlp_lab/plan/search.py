"""The mesh that fits and asks least."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import isqrt

from hypermlp_lab.plan.costs import Mesh, Step


@dataclass(frozen=True)
class Limits:
    """What there is, and what is decided already.

    Args:
        gpus: processes, one a GPU.
        per_node: GPUs of one machine: heads are shared within it alone.
        memory: bytes of a GPU that a step may take.
        heads, sequence: these dimensions of the mesh; None: any.
        checkpointing: None: only where needed.
    """

    gpus: int
    per_node: int
    memory: float
    heads: int | None = None
    sequence: int | None = None
    checkpointing: bool | None = None


def choose(step: Step, limits: Limits) -> tuple[Step, bool]:
    """The best way to do ``step`` on as many GPUs, and whether it fits; if not, the one of least memory.

    In this order, as ``docs/scale.md`` has it: fewest processes that share heads or a sequence, no checkpointing,
    fewest passes, fewest bytes sent.

    Raises:
        ValueError: no mesh is possible at all.
    """
    found = list(_candidates(step, limits))
    if not found:
        raise ValueError(_why_none(step, limits))
    fitting = [s for s in found if s.peak() <= limits.memory]
    if fitting:
        return min(fitting, key=_order), True
    return min(found, key=Step.peak), False


def _order(step: Step) -> tuple[int, bool, int, int]:
    mesh = step.mesh
    return mesh.heads * mesh.sequence, step.checkpointing, step.passes, sum(step.sent().values())


def _candidates(step: Step, limits: Limits) -> Iterator[Step]:
    ways = (False, True) if limits.checkpointing is None else (limits.checkpointing,)
    for mesh in _meshes(step, limits):
        rows = step.batch // mesh.data
        for passes in _divisors(rows):
            for checkpointing in ways:
                yield replace(step, mesh=mesh, passes=passes, checkpointing=checkpointing)


def _meshes(step: Step, limits: Limits) -> Iterator[Mesh]:
    for heads in _divisors(limits.gpus) if limits.heads is None else (limits.heads,):
        if limits.gpus % heads or step.model.attention.num_heads % heads or limits.per_node % heads:
            continue
        rest = limits.gpus // heads
        for sequence in _divisors(rest) if limits.sequence is None else (limits.sequence,):
            if not rest % sequence and not step.batch % (rest // sequence) and _divides(step, sequence):
                yield Mesh(rest // sequence, heads, sequence)


def _divides(step: Step, sequence: int) -> bool:
    """Whether ``shard_sequence`` takes such rows. Softmax attention is not planned so: its masks are squares there."""
    if sequence == 1:
        return True
    reach = max(step.model.attention.conv_size - 1, 1)
    whole = step.seq_len % (2 * sequence) == 0 and step.seq_len // (2 * sequence) >= reach
    return whole and step.model.attention.mixer != "softmax"


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, isqrt(number) + 1) if not number % n]
    return sorted({*small, *(number // n for n in small)})


def _why_none(step: Step, limits: Limits) -> str:
    c = step.model.attention
    sequences = "softmax attention is planned on whole sequences" if c.mixer == "softmax" else (
        f"--seq-len {step.seq_len} a multiple of 2 times the processes that share a sequence"
    )  # fmt: skip
    asked = "".join(
        f" --{name} {value}" for name, value in (("heads", limits.heads), ("sequence", limits.sequence)) if value
    )
    return (
        f"no mesh of --gpus {limits.gpus}{asked}: data x heads x sequence must be all GPUs, the data dimension divide "
        f"--batch {step.batch}, heads divide --num-heads {c.num_heads} and --gpus-per-node {limits.per_node}, and "
        f"{sequences}: give another --batch, --gpus or --num-heads"
    )
