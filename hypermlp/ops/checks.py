"""Checks at the operator's door. Every message names the argument, what came, and the remedy."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from hypermlp.checks import as_integer, check_kind, number
from hypermlp.ops.arguments import OperatorArgs, SequenceMix
from hypermlp.ops.modes import require, values_readable
from hypermlp.ops.varlen import ALL_TOKENS, Tokens

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_plain(name: str, x: Tensor) -> None:
    """No tensor of a kind that the operator cannot compute with: nested, or spread over processes."""
    if x.is_nested:
        raise TypeError(
            f"{name} is a nested tensor: pass its sequences end to end, {name}.values()[None], with "
            f"cu_seqlens={name}.offsets(), or pad them and pass attention_mask"
        )
    if hasattr(x, "device_mesh"):
        raise TypeError(
            f"{name} is a DTensor, for which hyper_attention has no sharding rules: spread heads by "
            "hypermlp.distributed.shard_heads(layer, mesh) and pass plain tensors (DTensor.to_local, full_tensor)"
        )


def check_kinds(x: OperatorArgs) -> None:
    """Tensors where tensors belong, so that whatever reads them next may rely on it."""
    for name, stream in (("q", x.q), ("k", x.k), ("v", x.v)):
        check_kind(name, stream, Tensor)
        check_plain(name, stream)
    for name, mix in (("routing_mix", x.routing_mix), ("readout_mix", x.readout_mix)):
        if not isinstance(mix, SequenceMix):
            raise TypeError(f"{name} must be a SequenceMix or None, got {type(mix).__name__}")
        for field in ("diag", "down", "up", "core"):
            table = getattr(mix, field)
            if table is not None and not isinstance(table, Tensor):
                raise TypeError(f"{name}.{field} must be a tensor or None, got {type(table).__name__}")


def tokens(x: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> Tokens:
    """Who is there of ``x`` ``[B, T, ...]``, as :func:`hypermlp.ops.hyper_attention` and the layers are told."""
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, x)
    elif attention_mask is None:
        return ALL_TOKENS
    if attention_mask is None:
        return Tokens(None, cu_seqlens)
    valid = check_attention_mask(attention_mask, x)
    return Tokens(None if values_readable(valid) and bool(valid.all()) else valid, cu_seqlens)


def checked(x: OperatorArgs) -> OperatorArgs:
    """``x``, whose ``tokens`` have been, with the number of its tables' rows as ``max_lag``, if all fits together."""
    check_streams(x.q, x.k, x.v, x.options.num_maps)
    eps = as_eps(x.options.eps, x.q.dtype)
    check_mix("routing_mix", x.routing_mix, x.q, x.q.shape[2])
    check_mix("readout_mix", x.readout_mix, x.q, x.v.shape[2])
    options = x.options._replace(eps=eps, max_lag=table_rows(x.routing_mix, x.readout_mix, x.options.max_lag))
    if not options.by_lag and options.max_lag is not None:
        check_positions(x.k.shape[1], options.max_lag, x.tokens.cu_seqlens)
    return x._replace(options=options)


def as_eps(eps: object, dtype: torch.dtype) -> float:
    """``eps`` as a float, positive in the precision of the computation, too: for ``dtype`` and at least float32."""
    found = number(eps)
    if found is None:
        raise TypeError(f"eps must be a number, got {eps!r}: give the smallest value of the norm, such as 1e-12")
    limits = torch.finfo(torch.promote_types(dtype, torch.float32))
    if not limits.smallest_normal <= found <= limits.max:
        raise ValueError(
            f"eps must be positive and finite, from {limits.smallest_normal:.2e} to {limits.max:.2e} "
            f"in the precision of the computation, got {eps!r}"
        )
    return float(found)


def check_streams(q: Tensor, k: Tensor, v: Tensor, num_maps: int) -> None:
    """``q`` ``[B, m, S*H, K]``, ``k`` ``[B, T, S*H, K]``, ``v`` ``[B, T, H, V]``: ranks, sizes, dtype, device."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must be [batch, length, heads, width], got shape {tuple(x.shape)}")
        if x.dtype not in _FLOATS:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} is {x.dtype} and q is {q.dtype}: cast them to one dtype, or use autocast")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} and q on {q.device}: move them to one device")
    if q.shape != k.shape and (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(f"k must have the shape of q but for its length, {tuple(q.shape)}, got {tuple(k.shape)}")
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(f"v must share batch and length with k, {tuple(k.shape[:2])}, got {tuple(v.shape[:2])}")
    if q.shape != k.shape and q.shape[1] > k.shape[1]:
        raise ValueError(
            f"q has {q.shape[1]} tokens and k {k.shape[1]}: queries are of all tokens or of the last ones, "
            "so give a key and a value for each"
        )
    for name, x in (("q", q), ("v", v)):
        if 0 in x.shape[2:]:
            raise ValueError(f"{name} has no heads or no width, shape {tuple(x.shape)}: both must be at least 1")
    if q.shape[2] != num_maps * v.shape[2]:
        raise ValueError(
            f"q has {q.shape[2]} score maps and v {v.shape[2]} heads: this selection takes {num_maps} maps a head, "
            f"so q and k need {num_maps * v.shape[2]}"
        )


def check_mix(name: str, mix: SequenceMix, q: Tensor, heads: int) -> None:
    """A mixing's tables ``[heads, L]``, ``[heads, L, R]`` and core ``[B, m, heads, R]`` against ``q``."""
    if (mix.down is None) != (mix.up is None):
        raise ValueError(f"{name}.down and {name}.up come together: give both or neither")
    if not mix.identity and mix.diag is None and mix.down is None:
        raise ValueError(f"{name} has no identity, no diag and no low-rank term, so it maps everything to zero")
    if mix.core is not None and mix.down is None:
        raise ValueError(f"{name}.core multiplies the low-rank term: give {name}.down and {name}.up too")
    for field, dims in (("diag", 2), ("down", 3), ("up", 3), ("core", 4)):
        x = getattr(mix, field)
        if x is None:
            continue
        if x.ndim != dims:
            raise ValueError(f"{name}.{field} must have {dims} dimensions, got shape {tuple(x.shape)}")
        if x.dtype not in _FLOATS:
            raise TypeError(f"{name}.{field} must be a floating-point tensor, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}.{field} is on {x.device} and q on {q.device}: move them to one device")
        if x.shape[dims - 2 if field == "core" else 0] != heads:
            raise ValueError(f"{name}.{field} must serve {heads} heads, got shape {tuple(x.shape)}")
        if 0 in (x.shape[2:] if field == "core" else x.shape):
            raise ValueError(f"{name}.{field} has an empty dimension, shape {tuple(x.shape)}: every size must be >= 1")
    if mix.down is not None and mix.up is not None and mix.down.shape != mix.up.shape:
        raise ValueError(f"{name}.up must have the shape of down, {tuple(mix.down.shape)}, got {tuple(mix.up.shape)}")
    if mix.core is not None and mix.down is not None:
        expected = (*q.shape[:2], heads, mix.down.shape[-1])
        if mix.core.shape != expected:
            raise ValueError(f"{name}.core must be {expected}, got {tuple(mix.core.shape)}")
        if mix.core.dtype != q.dtype:
            raise TypeError(f"{name}.core is {mix.core.dtype} and q is {q.dtype}: cast them to one dtype")
    tables = {x.dtype for x in mix.tables if x is not None}
    if tables - {q.dtype, torch.float32, torch.float64} or len(tables) > 1:
        raise TypeError(
            f"{name}'s tables must share one dtype, q's {q.dtype} or a wider one, "
            f"got {sorted(str(dtype) for dtype in tables)}"
        )


def table_rows(routing_mix: SequenceMix, readout_mix: SequenceMix, max_lag: int | None) -> int | None:
    """Rows all tables have, which is the operator's ``max_lag``; None without tables and without limit."""
    # torch.jit.trace gives sizes as tensors, of which each is another to a set
    rows = {int(x.shape[1]) for mix in (routing_mix, readout_mix) for x in mix.tables if x is not None}
    if max_lag is not None:
        rows.add(as_integer("max_lag", max_lag, 1, "None for no limit"))
    if len(rows) > 1:
        raise ValueError(f"all tables and max_lag must agree on the number of lags, got {sorted(rows)}")
    return rows.pop() if rows else None


def check_attention_mask(mask: Tensor, x: Tensor) -> Tensor:
    """A 0/1 mask ``[B, T]`` for ``x`` ``[B, T, ...]``, as bool."""
    check_kind("attention_mask", mask, Tensor)
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(
            f"attention_mask must be bool or integer 0/1, got {mask.dtype}: "
            "additive masks are not taken, pass which tokens are valid"
        )
    if mask.shape != x.shape[:2]:
        raise ValueError(f"attention_mask must be [batch, length] = {tuple(x.shape[:2])}, got {tuple(mask.shape)}")
    if mask.device != x.device:
        raise ValueError(f"attention_mask is on {mask.device} and its tokens on {x.device}: move them to one device")
    if mask.dtype != torch.bool and values_readable(mask) and bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError(
            f"attention_mask must hold 0 and 1 alone, got values from {int(mask.min())} to {int(mask.max())}: "
            "for packed sequences pass cu_seqlens"
        )
    return mask != 0


def check_cu_seqlens(cu_seqlens: Tensor, x: Tensor) -> None:
    """Bounds of packed sequences, int32 or int64 ``[N + 1]`` within 0 to T, for ``x`` ``[1, T, ...]``."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(
            f"cu_seqlens must be a tensor, got {type(cu_seqlens).__name__}: give torch.tensor([0, ...], "
            "dtype=torch.int32), or int64"
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}: give cu_seqlens.int()")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens must be [N + 1] with N >= 1, got shape {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device not in (x.device, torch.device("cpu")):
        raise ValueError(
            f"cu_seqlens is on {cu_seqlens.device} and its tokens on {x.device}: move it there or to the cpu"
        )
    if x.shape[0] != 1:
        raise ValueError(f"cu_seqlens needs batch 1, got {x.shape[0]}: flatten the sequences into one row")
    if not values_readable(cu_seqlens):
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] < 0 or bounds[-1] > x.shape[1]:
        raise ValueError(
            f"cu_seqlens must lie within 0 and {x.shape[1]} tokens, got {bounds[0]} to {bounds[-1]}: "
            "give each sequence's first token, and one past the last sequence's last"
        )
    if any(stop < start for start, stop in pairwise(bounds)):
        raise ValueError(f"cu_seqlens must not decrease, got {bounds}: give the sequences' bounds in order")


def check_positions(length: int, max_lag: int, cu_seqlens: Tensor | None) -> None:
    """By position a sequence fits the tables."""
    if length <= max_lag:
        return
    message = (
        f"does not fit position-indexed tables of {max_lag} rows: "
        "use shorter sequences, a larger max_lag or, if causal, layout='lag'"
    )
    if cu_seqlens is None:
        raise ValueError(f"a sequence of {length} tokens {message}")
    lengths = cu_seqlens.diff()
    which = f"a sequence of {int(lengths.max())} tokens" if values_readable(lengths, wait=True) else "a sequence"
    require((lengths <= max_lag).all(), f"{which} {message}")
