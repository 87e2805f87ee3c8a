"""What transformers' masks say of the tokens: which are padding, and where a packed document begins."""

from __future__ import annotations

import torch
from torch import Tensor

from hypermlp.checks import check_kind
from hypermlp.ops.modes import require, values_readable
from hypermlp.ops.varlen import Tokens


def read_mask(
    mask: Tensor | None,
    hidden_states: Tensor,
    past: int | Tensor,
    *,
    causal: bool,
    window: int | None,
    told: Tensor | None = None,
) -> Tokens:
    """The tokens that a mask describes, ``valid`` ``[B, T]``; bounds are of the rows laid end to end.

    Args:
        mask: None for all visible tokens; ``[B, 1, T, S]``, bool (True is visible) or additive.
        hidden_states: the new tokens, ``[B, T, hidden_size]``.
        past: tokens in the cache before them.
        causal: whether the layer hides later tokens.
        window: tokens that the layer sees, itself included; None for all.
        told: bounds of packed documents that came beside the mask.

    Raises:
        ValueError: for a mask that shows or hides anything else than padding, other documents and
            later tokens: a hyper layer would not obey it.
    """
    if told is not None:
        return _told(read_mask(mask, hidden_states, past, causal=causal, window=window), mask, told, past)
    if mask is None:
        return Tokens()
    batch, length = hidden_states.shape[:2]
    visible = _visible(mask, batch, length)
    rows = torch.arange(length, device=mask.device)
    own = visible[:, :, rows + past] if isinstance(past, Tensor) else visible.narrow(2, past, length)
    valid = own.diagonal(dim1=1, dim2=2)
    if length == 1:
        return Tokens(valid)
    begins = _begins(own, valid, rows)
    document = begins.cumsum(1)
    expected = (document[:, :, None] == document[:, None]) & valid[:, None]
    lag = rows[:, None] - rows
    if causal:
        expected &= lag >= 0
    differs = (own != expected) & valid[:, :, None]
    if window is not None:
        differs &= lag < window
    return _checked(valid, begins, differs, past, causal)


def _checked(valid: Tensor, begins: Tensor, differs: Tensor, past: int | Tensor, causal: bool) -> Tokens:
    if not values_readable(valid, begins, differs, wait=True):
        # where a document begins is data: a graph cannot depend on it, but it can refuse to be wrong
        require(
            ~(differs.any() | begins.any()),
            "packed sequences and custom masks need eager mode: do not compile, trace or transform the call",
        )
        return Tokens(valid)
    packed, unreadable, all_valid = torch.stack((begins.any(), differs.any(), valid.all())).tolist()
    if unreadable:
        understood = (
            "packed documents and causality are understood, and a sliding window of at least max_lag tokens"
            if causal
            else "and packed documents are understood by a layer that is not causal: every token of a document must "
            "see every other one"
        )
        raise ValueError(
            f"attention_mask hides or shows tokens that a hyper layer cannot: only padding{',' * causal} {understood}"
        )
    if packed and not (isinstance(past, int) and past == 0):
        raise ValueError("attention_mask: a new document begins among tokens that continue a cache: start a new cache")
    tokens = Tokens(None if all_valid else valid)
    if not packed:
        return tokens
    begins[:, 0] = True
    return tokens._replace(cu_seqlens=bounds_of(begins))


def check_tensors(**named: Tensor | None) -> None:
    """TypeError for what is no tensor, such as the lists of a tokenizer, and for nested ones."""
    for name, tensor in named.items():
        if tensor is not None:
            check_kind(name, tensor, Tensor, 'tokenizer(..., return_tensors="pt") gives tensors')
    refuse_nested(**named)


def refuse_nested(**named: Tensor | None) -> None:
    """TypeError for nested tensors, which hyper layers do not read."""
    for name, tensor in named.items():
        if isinstance(tensor, Tensor) and tensor.is_nested:
            raise TypeError(
                f"{name} is a nested tensor, which hyper layers do not take: pad it "
                "(torch.nested.to_padded_tensor), and say by a 0/1 attention_mask [batch, length] which tokens are real"
            )


def document_bounds(
    x: Tensor, cu_seq_lens_q: Tensor | None, cu_seq_lens_k: Tensor | None = None, seq_idx: Tensor | None = None
) -> Tensor | None:
    """Bounds of the packed documents that a collator names in words, int ``[N + 1]``; None if it names none.

    Args:
        x: the tokens, ``[B, T, ...]``.
        cu_seq_lens_q: the bounds, in the batch's rows laid end to end.
        cu_seq_lens_k: the same of the keys, which are the same tokens.
        seq_idx: int ``[B, T]``, the number of each token's document.
    """
    named = {"cu_seq_lens_q": cu_seq_lens_q, "cu_seq_lens_k": cu_seq_lens_k, "seq_idx": seq_idx}
    for name, given in named.items():
        if given is not None and not isinstance(given, Tensor):
            raise TypeError(
                f"{name} must be a tensor, got {type(given).__name__}: give torch.tensor(..., dtype=torch.int32), or "
                "int64"
            )
    if cu_seq_lens_k is not None:
        if cu_seq_lens_q is None or cu_seq_lens_q.shape != cu_seq_lens_k.shape:
            raise ValueError("cu_seq_lens_k must be cu_seq_lens_q: keys and queries are the same tokens")
        require((cu_seq_lens_q == cu_seq_lens_k).all(), "cu_seq_lens_k must be cu_seq_lens_q: the tokens are the same")
    if seq_idx is None or cu_seq_lens_q is not None:
        return cu_seq_lens_q
    if seq_idx.shape != x.shape[:2]:
        raise ValueError(f"seq_idx must be {list(x.shape[:2])}, got {list(seq_idx.shape)}")
    return bounds_of(begins_where(seq_idx, 0))


def begins_where(numbers: Tensor, step: int) -> Tensor:
    """Bool ``[B, T]``: tokens whose number is not ``step`` more than that of the one before, and every row's first."""
    begins = torch.ones_like(numbers, dtype=torch.bool)
    begins[:, 1:] = numbers.diff(dim=-1) != step
    return begins


def bounds_of(begins: Tensor) -> Tensor:
    """Bounds of the documents in rows laid end to end, int64 ``[N + 1]``, from whether each token begins one.

    Where that cannot be read there are as many documents as tokens, empty ones after the last.

    Args:
        begins: bool ``[B, T]``.
    """
    places = torch.arange(begins.numel() + 1, device=begins.device)
    tokens, stop = places[:-1], places[-1:]
    if values_readable(begins, wait=True):
        starts = tokens[begins.flatten()]
    else:
        starts = torch.where(begins.flatten(), tokens, stop).sort().values
    return torch.cat((starts, stop))


def _told(tokens: Tokens, mask: Tensor | None, told: Tensor, past: int | Tensor) -> Tokens:
    """Tokens in the documents that a caller named, which a mask beside them must show as well."""
    if mask is None:
        if not (isinstance(past, int) and past == 0):
            raise ValueError("cu_seq_lens_q: packed documents cannot continue a cache: start a new one")
        return tokens._replace(cu_seqlens=told)
    if not values_readable(mask, told, wait=True):
        raise ValueError("packed sequences need eager mode: do not compile or trace, or leave attention_mask out")
    batch, length = mask.shape[0], mask.shape[2]
    rows = torch.arange(0, (batch + 1) * length, length, device=told.device)
    shown = rows if tokens.cu_seqlens is None else tokens.cu_seqlens
    if shown.tolist() != torch.unique_consecutive(told).tolist():
        raise ValueError(
            "cu_seq_lens_q (or seq_idx) names other documents than attention_mask shows: transformers makes that mask "
            "from position_ids, so pass those of the documents too, each counted from 0"
        )
    return tokens


def _visible(mask: Tensor, batch: int, length: int) -> Tensor:
    """Bool ``[B, T, S]``."""
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2] != length or mask.shape[0] not in (1, batch):
        raise ValueError(f"attention_mask must be [{batch}, 1, {length}, keys], got {tuple(mask.shape)}")
    if mask.is_floating_point():
        mask = mask > torch.finfo(mask.dtype).min / 2
    elif mask.dtype != torch.bool:
        raise TypeError(f"attention_mask must be bool or additive (floating point), got {mask.dtype}")
    return mask[:, 0].expand(batch, -1, -1)


def _begins(own: Tensor, valid: Tensor, rows: Tensor) -> Tensor:
    """Where a valid token does not see the valid one before it, bool ``[B, T]``."""
    latest = torch.where(valid, rows, -1).cummax(1).values
    before = torch.cat((torch.full_like(latest[:, :1], -1), latest[:, :-1]), dim=1)
    sees = own.gather(2, before.clamp_min(0)[:, :, None])[:, :, 0]
    return valid & (before >= 0) & ~sees
