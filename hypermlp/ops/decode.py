"""New rows against cached rows: one token, or a block of them.

Keys and values come as the cache holds them, a few contiguous segments from the oldest token to
the newest, and are read once where they lie. Everything between the two reads is a vector of the
lags seen, so a token costs the same however many have passed beyond the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hypermlp.ops import reference
from hypermlp.ops.arguments import OperatorArgs, Options, SequenceMix
from hypermlp.ops.library import PATHS, Path, run
from hypermlp.ops.modes import needs_plain_operators
from hypermlp.ops.softplus import softplus
from hypermlp.ops.varlen import Tokens


class Past(NamedTuple):
    """What the cache holds of the tokens up to and including the new ones.

    Heads lie beside batch rows, as a batched product takes them; softmax attention has the last two dimensions of
    keys the other way round. Slots are counted over all segments, and run from the oldest token to
    the newest one, unless ``length`` says that they are a ring.

    Attributes:
        keys: segments ``[B * S*H, K, n_i]``, oldest first.
        values: segments ``[B * H, n_i, V]``, cut at the same places.
        valid: bool ``[B, n]`` over all segments, or None if every token counts.
        start: int64 ``[B]``, the slot of table row 0, for tables by position; None for tables by lag.
        length: tokens there have been, a 0-dim int64 tensor, where the one segment holds token ``t`` in slot
            ``t % n``; it may be on a GPU and is never read by the host.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    valid: Tensor | None
    start: Tensor | None = None
    length: Tensor | None = None


class StepArgs(NamedTuple):
    """What the operator computes with for the newest token against a cache, or for a block of the newest ones.

    Attributes:
        q: ``[B, S*H*K]``; of a block ``[B, m, S*H, K]``.
        past: keys and values, those of the new tokens among them; hidden tokens hold zeros.
        routing_mix, readout_mix: cores ``[B, heads, R]``; of a block ``[B, m, heads, R]``.
        options: as everywhere.
    """

    q: Tensor
    past: Past
    routing_mix: SequenceMix
    readout_mix: SequenceMix
    options: Options


class _Columns(NamedTuple):
    """How the slots of the cache stand beside the rows of the tables, for one new token.

    ``to_columns`` ``[B or 1, c]`` names the slot of each table row, ``to_slots`` ``[B or 1, n]`` the
    table row of each slot; ``visible`` ``[B or 1, c]`` and ``readable`` ``[B or 1, n]`` are False
    where there is none.
    """

    to_columns: Tensor
    visible: Tensor
    to_slots: Tensor
    readable: Tensor


def decode_step(x: StepArgs) -> Tensor:
    """``o`` ``[B, H*V]`` of the newest token, computed in float32 or better as everywhere."""
    q, past, routing_mix, readout_mix, options = x
    columns = _columns(past)
    batch, keys, values = q.shape[0], past.keys, past.values
    if not batch:
        return q.new_empty(0, q.shape[1] // (options.num_maps * keys[0].shape[1]) * values[0].shape[2])
    dtype = torch.promote_types(q.dtype, torch.float32)
    query = q.reshape(keys[0].shape[0], 1, -1)
    if q.dtype != dtype:
        query, keys = query.to(dtype), [part.to(dtype) for part in keys]
    parts = [_product(query, part) for part in keys]
    s = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    y = _mix(_to_columns(_by_head(s, batch), columns), routing_mix)
    if columns is not None:
        y = torch.where(columns.visible, y, 0)
    gate, *scale = y.split_with_sizes((y.shape[0] // options.num_maps,) * options.num_maps)
    # a score of minus infinity selects nothing in relu and softplus: NaN, made of zero times infinity, stays one
    a = torch.relu(gate / _row_norm(gate, options.eps) if options.norm else torch.add(gate, gate, alpha=0))
    if scale:
        a = a * torch.add(softplus(scale[0]), scale[0], alpha=0)
    w = _by_row(_to_slots(_mix(a, readout_mix), columns), batch)
    o = _weighted(w, values[0], q.dtype) if len(values) == 1 else _weighted_sum(w, values[0], values[1], q.dtype)
    return o.view(batch, -1).to(q.dtype)


def _row_norm(x: Tensor, eps: float) -> Tensor:
    """``max(||x||, eps)`` along the last dimension, which stays; in float64, where no square of a float32 overflows."""
    wide = x.dtype if x.device.type == "mps" else torch.float64  # which has none
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return norm.clamp_min(eps).to(x.dtype)


def _weighted(weights: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    """``weights`` ``[B * H, 1, n]`` over ``values`` ``[B * H, n, V]`` of ``dtype``, widened if it must be."""
    if dtype != torch.bfloat16:
        return _product(weights, values.to(weights.dtype))
    # bfloat16 has float32's range: of the weights' digits the lower half comes as a second row, and nothing is copied
    upper = weights.bfloat16()
    both = torch.bmm(torch.cat((upper, (weights - upper).bfloat16()), dim=1), values)
    return both.to(weights.dtype).sum(1, keepdim=True)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """``x @ y``, by the library of matrix products in compiled steps too."""
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        # Inductor writes a product of one row out as a loop, which is slower, but not the sum of a tensor and a product
        return torch.baddbmm(x.new_empty(*x.shape[:2], y.shape[2]), x, y, beta=0)
    return torch.bmm(x, y)


def _by_head(x: Tensor, batch: int) -> Tensor:
    """``[B * heads, 1, n]`` as ``[heads, B, n]``: as it is for one row, where every view tells."""
    return x if batch == 1 else x.view(batch, -1, x.shape[-1]).transpose(0, 1)


def _by_row(x: Tensor, batch: int) -> Tensor:
    """The way back, to ``[B * heads, 1, n]``."""
    return x if batch == 1 else x.transpose(0, 1).reshape(-1, 1, x.shape[-1])


def _weighted_sum(weights: Tensor, older: Tensor, newer: Tensor, dtype: torch.dtype) -> Tensor:
    """``weights`` ``[B * H, 1, n]`` over two segments ``[B * H, n_i, V]``, ``[B * H, 1, V]``."""
    split = older.shape[1]
    first = _weighted(weights[..., :split], older, dtype)
    if dtype in (torch.bfloat16, torch.float16):
        return first + _weighted(weights[..., split:], newer, dtype)
    return torch.baddbmm(first, weights[..., split:], newer)


def _to_columns(s: Tensor, columns: _Columns | None) -> Tensor:
    """Scores ``[heads, B, n]`` by slot as those by table row, ``[heads, B, c]``."""
    if columns is None:
        return s.flip(-1)
    index = columns.to_columns.expand(*s.shape[:2], -1)
    return torch.where(columns.visible, s.gather(-1, index), 0)


def _to_slots(w: Tensor, columns: _Columns | None) -> Tensor:
    """Weights ``[heads, B, c]`` by table row as those by slot, ``[heads, B, n]``."""
    if columns is None:
        return w.flip(-1)
    index = columns.to_slots.expand(*w.shape[:2], -1)
    return torch.where(columns.readable, w.gather(-1, index), 0)


def _mix(x: Tensor, mix: SequenceMix) -> Tensor:
    """``x (Diag(identity + diag) + down Diag(core) up^T)`` for one token, ``[heads, B, c]``."""
    diag, down, up, core, identity = mix
    y = x if identity else torch.zeros_like(x)
    if diag is not None:
        y = torch.addcmul(y, x, _rows(diag, x).unsqueeze(1))
    if down is not None and up is not None:
        z = _product(x, _rows(down, x))
        if core is not None:
            z *= core.transpose(0, 1)
        up = _rows(up, x).mT
        y = torch.baddbmm(y, z, up) if y is x else y.baddbmm_(z, up)
    return y


def _rows(table: Tensor, x: Tensor) -> Tensor:
    """As many rows of ``[heads, L, ...]`` as ``x`` has columns, and its dtype; a view only where it must be."""
    count = x.shape[-1]
    if table.shape[1] != count:
        table = table[:, :count]
    return table if table.dtype == x.dtype else table.to(x.dtype)


def _columns(past: Past) -> _Columns | None:
    """None where slots are lags, oldest first, all of them visible."""
    if past.length is not None:
        return _ring_columns(past.length, past.keys[0].shape[2], past.valid)
    if past.start is not None:
        return _position_columns(past.start, sum(keys.shape[2] for keys in past.keys), past.valid)
    return None if past.valid is None else _lag_columns(past.valid)


def _lag_columns(valid: Tensor) -> _Columns:
    """Columns by lag, oldest slot last, for slots some of which are hidden (``valid`` bool ``[B, n]``)."""
    reverse = torch.arange(valid.shape[1] - 1, -1, -1, device=valid.device)[None]
    return _Columns(reverse, valid.flip(-1), reverse, valid)


def _position_columns(start: Tensor, length: int, valid: Tensor | None) -> _Columns:
    """Columns by position, counted from each row's own ``start`` ``[B]``."""
    slots = torch.arange(length, device=start.device)
    to_columns = start[:, None] + slots
    visible = to_columns < length
    to_columns = to_columns.clamp(0, length - 1)
    to_slots = slots - start[:, None]
    readable = to_slots >= 0
    if valid is not None:
        visible = visible & valid.gather(1, to_columns)
        readable = readable & valid
    return _Columns(to_columns, visible, to_slots.clamp_min(0), readable)


def _ring_columns(length: Tensor, capacity: int, valid: Tensor | None) -> _Columns:
    """Columns by lag in a ring that ``length`` tokens have come to: any number, one graph."""
    # the slot of a lag is found as the lag of a slot is; one remainder, since they are slow
    slots = torch.arange(capacity, device=length.device)
    other = (length - 1) % capacity - slots
    other = torch.where(other < 0, other + capacity, other)[None]
    visible, readable = (slots < length)[None], other < length
    if valid is not None:
        visible = visible & valid.gather(1, other.expand(valid.shape[0], -1))
        readable = readable & valid
    return _Columns(other, visible, other, readable)


def decode_block(block: StepArgs, path: Path | None = None) -> Tensor:
    """``o`` ``[B, m, H, V]`` of the ``m`` newest tokens.

    The last rows of a ``path``'s, by default the chunked path's; segments are joined once for the whole block.
    Its backward leaves hidden keys' gradients to the door: what is to be differentiated takes the reference.
    """
    q, past, routing_mix, readout_mix, options = block
    batch, maps = q.shape[0], q.shape[2]
    joined = torch.cat(list(past.keys), dim=2).mT, torch.cat(list(past.values), dim=1)
    keys, values = (
        part.view(batch, heads, *part.shape[1:]).transpose(1, 2)
        for part, heads in zip(joined, (maps, maps // options.num_maps), strict=True)
    )
    x = OperatorArgs(q, keys, values, routing_mix, readout_mix, Tokens(past.valid), options)
    differentiated = torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in x.tensors)
    if differentiated or needs_plain_operators():
        return reference.forward(x)
    return run(PATHS["chunked"] if path is None or not path.takes_blocks else path, x)
