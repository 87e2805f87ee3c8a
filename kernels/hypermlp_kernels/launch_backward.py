"""Host function of the backward: the gradients asked for, from what the forward saved, in bounded scratch memory."""

from __future__ import annotations

from contextlib import suppress

import torch
import triton
from torch import Tensor

from hypermlp_kernels.arguments import Gradients, Needs, Options, SequenceMix
from hypermlp_kernels.backward_pass import BackwardPass
from hypermlp_kernels.backward_tiles import BackwardTile, backward_tiles
from hypermlp_kernels.call import Call, interpreted, on_device, precision_of, unit_stride
from hypermlp_kernels.schedule import sequences
from hypermlp_kernels.tiles import family_of

SCRATCH_BYTES = 512 << 20
_INTERPRETER_TILE = BackwardTile(32, 16, 32, 16, 16, 1, 1)


def backward(
    grad_o: Tensor,
    o: Tensor,
    statistics: tuple[Tensor, Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routing_mix: SequenceMix,
    readout_mix: SequenceMix,
    needs: Needs,
    options: Options,
    *,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    allow_tf32: bool = False,
    scratch_bytes: int = SCRATCH_BYTES,
    tile: BackwardTile | None = None,
    span: int | None = None,
) -> Gradients:
    """Gradients of the operator; None: not asked for.

    Args:
        grad_o: ``[B, T, H, V]``, rounded to the dtype of ``q``.
        o: the forward's output as it came, and with it its ``statistics`` ``(z1, rho, z2)``.
        needs: the gradients to make, of tensors that are there.
        scratch_bytes: limit of the memory for maps, and for sums over parts of rows. Rows are taken in chunks
            that keep to it, one block of rows of one head at the least; besides it memory is linear in ``T``.
        tile: instead of the table's.
        span: key tiles of a part, into which all longer rows are split, instead of the plan's choice.
        q, k, v, routing_mix, readout_mix, options and the others: as :func:`hypermlp_kernels.launch.forward` took them.

    Returns:
        In float32 (float64 for float64); summed in a fixed order, so the same input gives the same bits.
    """
    q, k, v = (unit_stride(_finite(x)) for x in (q, k, v))
    routing_mix, readout_mix = (
        mix if mix.core is None else mix._replace(core=_finite(mix.core)) for mix in (routing_mix, readout_mix)
    )
    # rows that are NaN, since they see a number that is not finite, pass nothing back
    marked = o[..., :1].isnan()
    grad_o, o = grad_o.masked_fill(marked, 0), o.masked_fill(marked, 0)
    kept = None
    if attention_mask is not None or cu_seqlens is not None:
        kept = sequences(attention_mask, cu_seqlens, v.shape[0], v.shape[1], q.device)
    z1, rho, z2 = (_finite(x).contiguous() for x in statistics)
    rho = rho.masked_fill(marked[..., 0], 1)
    if options.norm:
        o = o.masked_fill((rho <= options.eps)[..., None], 0)
    # rows of extreme size in a unit of their own: all but the queries' gradients stay as they are
    unit = _units(rho, q.dtype)
    q, z1 = (_by_unit(x, unit) for x in (q, z1))
    rho, z2 = rho / unit, z2 / unit[..., None]
    call = Call(
        q, k, v, routing_mix, readout_mix, z1, rho, z2, options, precision_of(q.dtype, allow_tf32),
        attention_mask, kept, None,
    )  # fmt: skip
    with on_device(q):
        *larger, smallest = _choices(call, tile)
        for choice in larger:
            # the kernels share a tile: where one of them does not fit, all start again with the next
            with suppress(triton.OutOfResources):
                return _in_unit(BackwardPass(call, needs, choice, grad_o, o, scratch_bytes, span).run(), unit)
        return _in_unit(BackwardPass(call, needs, smallest, grad_o, o, scratch_bytes, span).run(), unit)


def _finite(x: Tensor) -> Tensor:
    """Zeros in place of NaN and infinities: products meet hidden pairs too, and zero times NaN is NaN."""
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)


def _units(rho: Tensor, dtype: torch.dtype) -> Tensor:
    """The power of two below ``rho`` where its square would overflow or vanish, else 1; float16 has no room for it."""
    if dtype == torch.float16:
        return torch.ones_like(rho)
    unit = rho / (2 * torch.frexp(rho).mantissa)
    return torch.where((rho < 2.0**-50) | (rho > 2.0**60), unit, 1)


def _by_unit(x: Tensor, unit: Tensor) -> Tensor:
    """``x`` ``[B, T, maps, width]`` with the gate maps, which come first, in the rows' units ``[B, T, heads]``."""
    heads = unit.shape[2]
    return torch.cat((x[:, :, :heads] / unit[..., None].to(x.dtype), x[:, :, heads:]), dim=2)


def _in_unit(grads: Gradients, unit: Tensor) -> Gradients:
    return grads if grads.q is None else grads._replace(q=_by_unit(grads.q, unit))


def _choices(call: Call, tile: BackwardTile | None) -> tuple[BackwardTile, ...]:
    if tile is not None:
        return (tile,)
    if interpreted():
        return (_INTERPRETER_TILE,)
    target = triton.runtime.driver.active.get_current_target()
    return backward_tiles(call.precision, call.v.shape[-1], family_of(target.backend, target.arch))
