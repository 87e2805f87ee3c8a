"""What the self-check runs of a single token after a cache, and of the short convolution."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hypermlp.ops import decode, triton
from hypermlp.ops.arguments import SequenceMix
from hypermlp.ops.decode import Past, StepArgs
from hypermlp.ops.self_check import Change, Errors, Family, euclidean, judge, largest
from hypermlp.ops.self_check_cases import LENGTH, Table, map_mix, normals

_HALVES = (torch.float16, torch.bfloat16)
# tokens that have come to a ring of LENGTH slots: it has room left, and it has gone round
_RING_LENGTHS = (LENGTH - 23, LENGTH + 37)
Plain = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


def step_family(x: StepArgs) -> Family:
    """Of a step like this one."""
    q, past, routing_mix, readout_mix, options = x
    batch = q.shape[0]
    keys, values = past.keys[0], past.values[0]
    traits = (
        options.selection, options.norm, batch == 1, len(past.keys), keys.dtype, values.dtype,
        keys.shape[0] // batch, keys.shape[1], _order(keys), values.shape[0] // batch, values.shape[2], _order(values),
        Table.of(routing_mix), Table.of(readout_mix), past.valid is None, past.start is None, past.length is None,
    )  # fmt: skip
    return Family("decode", q.device, q.dtype, traits)


def step_errors(x: StepArgs) -> Errors:
    """Of a step with a cache of few tokens, and otherwise like this one."""
    q, past, routing_mix, readout_mix, options = x
    normal = normals(1)
    batch = min(q.shape[0], 2)
    heads = (past.keys[0].shape[0] // q.shape[0], past.values[0].shape[0] // q.shape[0])
    width, values = past.keys[0].shape[1], past.values[0].shape[2]

    def mixing(mix: SequenceMix, count: int) -> SequenceMix:
        core = None if mix.core is None else normal(batch, count, mix.rank, of=mix.core)
        tables = map_mix(mix._replace(core=None), lambda x: normal(count, LENGTH, *x.shape[2:], size=0.3, of=x))
        return tables._replace(core=core)

    mixes = mixing(routing_mix, heads[0]), mixing(readout_mix, heads[1])
    query = normal(batch, heads[0] * width, size=width**-0.25, of=q)
    valid, start = _places(past, batch)
    keys = normal(batch * heads[0], width, LENGTH, size=width**-0.25, of=past.keys[0])
    held = normal(batch * heads[1], LENGTH, values, of=past.values[0])
    if valid is not None:
        keys = torch.where(valid.repeat_interleave(heads[0], 0)[:, None], keys, 0)
        held = torch.where(valid.repeat_interleave(heads[1], 0)[:, :, None], held, 0)
    options = options._replace(eps=1e-12, max_lag=LENGTH)

    def step(length: int | None, change: Change, compute: triton.Step, device: torch.device | str = "cpu") -> Tensor:
        def there(x: Tensor | None) -> Tensor | None:
            return x if x is None else x.to(device)

        ring = None if length is None else torch.tensor(length, device=device)
        segments = [
            _segments(change(x).to(device), parts, dim)
            for x, parts, dim in ((keys, past.keys, 2), (held, past.values, 1))
        ]
        routing, readout = (map_mix(mix, lambda x: change(x).to(device)) for mix in mixes)
        held_there = Past(segments[0], segments[1], there(valid), there(start), ring)
        return compute(StepArgs(change(query).to(device), held_there, routing, readout, options))

    lengths = (None,) if past.length is None else _RING_LENGTHS
    name = {length: "o" if length is None else f"o after {length} tokens" for length in lengths}
    found = {name[n]: step(n, lambda x: x, triton.decode_step, q.device).cpu() for n in lengths}

    def evaluate(precision: torch.dtype, change: Change) -> Mapping[str, Tensor]:
        return {name[n]: step(n, change, decode.decode_step) for n in lengths}

    return judge(found, evaluate, q.dtype, largest)


def _order(x: Tensor) -> tuple[bool, ...]:
    return tuple(stride == 1 for stride in x.stride())


def _segments(x: Tensor, parts: Sequence[Tensor], dim: int) -> list[Tensor]:
    """``x`` as the cache would hold it: in one memory, in the order of the call's, from any slot on if it is a ring."""
    last = parts[0].stride(dim) == 1
    memory = x if last == (dim == 2) else x.mT.contiguous().mT
    if len(parts) == 1:
        return [memory]
    # the newer tokens lie before the older ones
    older = LENGTH // 3 + 2
    turned = memory.roll(LENGTH - older, dim) if memory.is_contiguous() else memory.mT.roll(LENGTH - older, 3 - dim).mT
    return [turned.narrow(dim, LENGTH - older, older), turned.narrow(dim, 0, LENGTH - older)]


def _places(past: Past, batch: int) -> tuple[Tensor | None, Tensor | None]:
    """Slots that are hidden, and where rows start, if the call has such."""
    valid = start = None
    if past.valid is not None:
        valid = torch.ones(batch, LENGTH, dtype=torch.bool)
        valid[0, :7] = valid[-1, LENGTH // 2 : LENGTH // 2 + 3] = False
    if past.start is not None:
        start = torch.zeros(batch, dtype=torch.int64)
        start[0] = 7 if past.valid is not None else 0
    return valid, start


def conv_family(x: Tensor, taps: Tensor, packed: bool, past: int, needs: tuple[bool, bool]) -> Family:
    """Of a short convolution like this one, with the gradients that it ``needs``."""
    order = (_order(x), _order(taps), tuple(stride % 16 == 0 for stride in x.stride()[:2]))
    return Family("short convolution", x.device, x.dtype, (taps.dtype, *taps.shape, packed, past, needs, order))


def conv_errors(x: Tensor, taps: Tensor, packed: bool, past: int, needs: tuple[bool, bool], plain: Plain) -> Errors:
    """Of the convolution of few tokens and of its gradients, against ``plain`` operators."""
    from hypermlp.ops.varlen import sequence_starts, sequence_stops

    kernels = triton.short_conv()
    normal = normals(1)
    batch, channels = 1 if packed else 2, x.shape[2]
    wide, weights = normal(batch, past + LENGTH, channels, of=x), normal(*taps.shape, of=taps)
    dtype = torch.promote_types(x.dtype, taps.dtype)
    grad_y = normal(batch, LENGTH, channels, of=x.new_empty(0, dtype=dtype))
    bounds = torch.tensor([2, 3, LENGTH // 2 + 1, LENGTH // 2 + 1, LENGTH - 3]) if packed else None

    there = [y.to(x.device) for y in (wide, weights, grad_y)]
    starts = stops = None
    if bounds is not None:
        cpu = torch.device("cpu")
        starts, stops = (find(LENGTH, bounds, cpu).to(x.device) for find in (sequence_starts, sequence_stops))
    found = {"y": kernels.forward(*there[:2], past=past, starts=starts).cpu()}
    names = [name for name, need in zip(("gradient of x", "gradient of taps"), needs, strict=True) if need]
    if names:
        grads = kernels.backward(
            there[2], *there[:2], past=past, stops=stops, needs_x=needs[0], needs_taps=needs[1]
        )  # fmt: skip
        found |= dict(zip(names, (grad.cpu() for grad in grads if grad is not None), strict=True))

    def evaluate(precision: torch.dtype, change: Change) -> Mapping[str, Tensor]:
        leaves = [change(y).detach().clone().requires_grad_() for y in (wide, weights)]
        before = leaves[0][:, :past] if past else None
        y = plain(leaves[0][:, past:], leaves[1], bounds, before)
        grads = torch.autograd.grad(y, leaves, grad_y.to(y.dtype))
        return {"y": y.detach(), "gradient of x": grads[0], "gradient of taps": grads[1]}

    # a tap's gradient is a sum over all tokens
    return judge(found, evaluate, dtype, euclidean if dtype in _HALVES else largest)
