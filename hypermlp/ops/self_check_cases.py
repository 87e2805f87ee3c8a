"""What the self-check runs: for a call small inputs of the same widths and switches, hence through the same kernels.

They are awkward: a length that no tile divides, a window shorter than it, and where the call has a mask or packed
sequences, padding on both sides and inside, sequences of one token and of none. Tables are never at their start.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from hypermlp.ops import reference, triton
from hypermlp.ops.arguments import DIFFERENTIABLE, Gradients, Needs, OperatorArgs, SequenceMix
from hypermlp.ops.self_check import Change, Errors, Family, Measure, euclidean, judge, largest
from hypermlp.ops.varlen import Tokens

# beyond the tallest tile's 128 rows by so much that some of its tiles are seen whole, and multiples of no tile
LENGTH, WINDOW = 200, 193
_HALVES = (torch.float16, torch.bfloat16)


def forward_family(x: OperatorArgs) -> Family:
    """Of the forward of a call like ``x``."""
    return _family("forward", x, ())


def backward_family(x: OperatorArgs, needs: Needs) -> Family:
    """Of its backward for the gradients that it ``needs``."""
    return _family("backward", x, (needs, _may_be_split(x)))


def forward_errors(x: OperatorArgs) -> Errors:
    """Of both designs of the forward, on inputs like those of ``x``, at tokens that are no padding."""
    from hypermlp_kernels import launch
    from hypermlp_kernels.autotune import TUNED

    twin = _with_extreme_row(like(x))
    there = _to(twin, x.q.device)
    found = {}
    with TUNED.searching(False):
        for design in ("recompute", "store"):
            o = launch.forward(*_arguments(there), there.options, **triton.keywords(there), design=design)[0]
            found[f"o ({design})"] = twin.tokens.zeroed(o.to(x.q.dtype).cpu())

    def evaluate(precision: torch.dtype, change: Change) -> Mapping[str, Tensor]:
        o = _reference(mapped(twin, change), precision)
        return dict.fromkeys(found, twin.tokens.zeroed(o))

    return judge(found, evaluate, precision_of(x.q.dtype), largest)


def backward_errors(x: OperatorArgs, needs: Needs) -> Errors:
    """Of the gradients that a call like ``x`` ``needs``, by both ways to take long rows where it may have such."""
    from hypermlp_kernels import launch, launch_backward
    from hypermlp_kernels.autotune import TUNED

    twin = like(x)
    there = _to(twin, x.q.device)
    grad_o = twin.tokens.zeroed(normals(2)(*twin.v.shape, of=x.q))
    asked = (needs.q, needs.k, needs.v, *needs.routing, *needs.readout)
    names = [name for name, need in zip(DIFFERENTIABLE, asked, strict=True) if need]
    found: dict[str, Tensor] = {}
    with TUNED.searching(False):
        o, z1, rho, z2 = launch.forward(*_arguments(there), there.options, **triton.keywords(there))
        for span in (None, 1) if _may_be_split(x) else (None,):
            grads = launch_backward.backward(
                grad_o.to(o.device), o, (z1, rho, z2), *_arguments(there), needs, there.options,
                span=span, **triton.keywords(there),
            )  # fmt: skip
            found |= _named(grads, twin, f"gradient of {{}} (parts of {span} tile)" if span else "gradient of {}")

    def evaluate(precision: torch.dtype, change: Change) -> Mapping[str, Tensor]:
        exact = mapped(twin, lambda y: change(y).detach().clone().requires_grad_())
        by_name = dict(zip(DIFFERENTIABLE, exact.tensors, strict=True))
        leaves = [y for name in names if (y := by_name[name]) is not None]
        o = _reference(exact, precision)
        grads = torch.autograd.grad(o, leaves, grad_o.to(o.dtype))
        exact_grads = {f"gradient of {name}": grad for name, grad in zip(names, grads, strict=True)}
        return {name: exact_grads[name.split(" (")[0]] for name in found}

    # The selection's derivative jumps where a score changes its sign. Scores in half precision do so here and there, in
    # any path and each elsewhere, and one row is then off by far more than rounding.
    measure: Measure = euclidean if x.q.dtype in _HALVES else largest
    return judge(found, evaluate, precision_of(x.q.dtype), measure)


def like(x: OperatorArgs) -> OperatorArgs:
    """Small random inputs on the CPU, of the widths, dtypes and switches of ``x``."""
    normal = normals(1)
    packed, (maps, width), (heads, values) = x.tokens.cu_seqlens is not None, x.q.shape[2:], x.v.shape[2:]
    batch = 1 if packed else 2
    window = x.options.window is not None or x.options.by_lag
    rows = WINDOW if window else LENGTH + 7
    has_tables = any(table is not None for mix in (x.routing_mix, x.readout_mix) for table in mix.tables)

    def stream(y: Tensor, count: int, width: int, size: float) -> Tensor:
        # a column more and not a view of it: rows then begin where those of the call do, at multiples of 16 or not
        extra = 0 if _aligned(y) else 1
        return normal(batch, LENGTH, count, width + extra, size=size, of=y)[..., :width]

    def mixing(mix: SequenceMix, count: int) -> SequenceMix:
        diag, down, up = (
            None if table is None else normal(count, rows, *table.shape[2:], size=0.3, of=table) for table in mix.tables
        )
        core = None if mix.core is None else normal(batch, LENGTH, count, mix.rank, of=mix.core)
        return SequenceMix(diag, down, up, core, mix.identity)

    # scores of size one, whatever the width
    q, k = (stream(y, maps, width, width**-0.25) for y in (x.q, x.k))
    tokens = Tokens(_mask(batch) if x.tokens.valid is not None else None, _bounds(x.tokens.cu_seqlens))
    options = x.options._replace(eps=1e-12, max_lag=rows if has_tables or window else None)
    routing, readout = mixing(x.routing_mix, maps), mixing(x.readout_mix, heads)
    twin = OperatorArgs(q, k, stream(x.v, heads, values, 1.0), routing, readout, tokens, options)
    return twin.map_streams(lambda y: tokens.zeroed(y))


def normals(seed: int) -> Callable[..., Tensor]:
    """What draws ``size`` times normal numbers of a shape, in the dtype of a tensor."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int, size: float = 1.0, of: Tensor) -> Tensor:
        return (size * torch.randn(shape, generator=rng, dtype=torch.float64)).to(of.dtype)

    return normal


def mapped(x: OperatorArgs, change: Change) -> OperatorArgs:
    """``x`` with ``change`` of all floating-point tensors."""
    routing, readout = (map_mix(mix, change) for mix in (x.routing_mix, x.readout_mix))
    return x._replace(q=change(x.q), k=change(x.k), v=change(x.v), routing_mix=routing, readout_mix=readout)


def map_mix(mix: SequenceMix, change: Change) -> SequenceMix:
    """``mix`` with ``change`` of its tensors."""
    diag, down, up, core = (y if y is None else change(y) for y in mix.tensors)
    return SequenceMix(diag, down, up, core, mix.identity)


def precision_of(dtype: torch.dtype) -> torch.dtype:
    """What products of ``dtype`` are made in; tf32 has as many digits as float16, and the CPU has only that."""
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return torch.float16 if tf32 else dtype


class Table(NamedTuple):
    """What a kernel knows of a mixing when it is compiled."""

    identity: bool
    rank: int
    dtypes: tuple[torch.dtype | None, ...]

    @classmethod
    def of(cls, mix: SequenceMix) -> Table:
        return cls(mix.identity, mix.rank, tuple(None if x is None else x.dtype for x in mix.tensors))


def _family(kernels: str, x: OperatorArgs, more: tuple[Hashable, ...]) -> Family:
    from hypermlp_kernels.autotune import TUNED

    o = x.options
    traits = (
        o.selection, o.norm, o.causal, o.layout, *x.q.shape[2:], *x.v.shape[2:],
        Table.of(x.routing_mix), Table.of(x.readout_mix),
        x.tokens.valid is None, x.tokens.cu_seqlens is None, *(_aligned(y) for y in (x.q, x.k, x.v)),
        precision_of(x.q.dtype), TUNED.revision, *more,
    )  # fmt: skip
    return Family(kernels, x.q.device, x.q.dtype, traits)


def _may_be_split(x: OperatorArgs) -> bool:
    """Whether rows are long enough for the backward to take them in parts, by kernels of their own."""
    from hypermlp_kernels.backward_plan import PART_KEYS

    return min(x.q.shape[1], x.options.window or x.q.shape[1]) > PART_KEYS


def _with_extreme_row(x: OperatorArgs) -> OperatorArgs:
    """``x`` with gate scores in one row whose squares overflow, which a kernel of its own puts right."""
    if not x.options.norm or precision_of(x.q.dtype) == torch.float16:
        return x
    q = x.q.clone()
    q[:, LENGTH // 3, : x.v.shape[2]] *= 1e25
    return x._replace(q=q)


def _aligned(y: Tensor) -> bool:
    return all(stride % 16 == 0 for stride in y.stride()[:3])


def _mask(batch: int) -> Tensor:
    valid = torch.ones(batch, LENGTH, dtype=torch.bool)
    valid[0, :5] = valid[0, LENGTH // 2 : LENGTH // 2 + 3] = False
    valid[-1, 9] = valid[-1, -(LENGTH // 5) :] = False
    return valid


def _bounds(cu_seqlens: Tensor | None) -> Tensor | None:
    if cu_seqlens is None:
        return None
    return torch.tensor([2, 3, LENGTH // 2 + 1, LENGTH // 2 + 1, LENGTH - 3], dtype=cu_seqlens.dtype)


def _to(x: OperatorArgs, device: torch.device) -> OperatorArgs:
    valid, bounds = (y if y is None else y.to(device) for y in x.tokens)
    return mapped(x, lambda y: y.to(device))._replace(tokens=Tokens(valid, bounds))


def _arguments(x: OperatorArgs) -> tuple[Tensor, Tensor, Tensor, SequenceMix, SequenceMix]:
    return x.q, x.k, x.v, x.routing_mix, x.readout_mix


def _named(grads: Gradients, x: OperatorArgs, name: str) -> dict[str, Tensor]:
    named = zip(DIFFERENTIABLE, grads.flat, x.tensors, strict=True)
    return {name.format(key): g.to(y.dtype).cpu() for key, g, y in named if g is not None and y is not None}


def _reference(x: OperatorArgs, precision: torch.dtype) -> Tensor:
    # an eps that is zero in float16 would make padded rows 0 / 0
    eps = max(x.options.eps, torch.finfo(precision).smallest_normal)
    return reference.forward(x._replace(options=x.options._replace(eps=eps)), precision)
