"""Masks that hosts hand to their attention, read as which tokens are padding; anything else is refused."""

from __future__ import annotations

import torch
from torch import Tensor

from hypermlp.config import HyperConfig
from hypermlp.ops.modes import require, values_readable

# exp of it is zero in every floating dtype, so that softmax hides what is given it
_HIDES = -1e4


def visible(mask: Tensor, name: str, *, true_hides: bool = False) -> Tensor:
    """Bool, True for what may be seen.

    Args:
        mask: bool, or additive: 0 for what is seen, ``-inf`` or a number below -10000 for what is hidden.
        name: of the argument, for messages.
        true_hides: whether True in a bool mask hides, as in ``torch.nn``.
    """
    if mask.dtype == torch.bool:
        return ~mask if true_hides else mask
    if not mask.is_floating_point():
        raise TypeError(f"{name} must be bool or additive (floating point), got {mask.dtype}")
    seen = mask == 0
    require(
        (seen | (mask <= _HIDES)).all(),
        f"{name} adds other numbers than 0 and -inf to scores: a hyper layer has no softmax, so biases of scores "
        "(relative positions, ALiBi) mean nothing to it",
    )
    return seen


def padding(seen: Tensor, x: Tensor, config: HyperConfig, remedy: str = "") -> Tensor:
    """Which tokens are valid, bool ``[B, T]``, by an ``attn_mask`` of who sees whom.

    Args:
        seen: bool ``[B, T, T]``, or ``[1, T, T]`` for all rows, True where a query (row) sees a key (column).
        x: the tokens, ``[B, T, ...]``.
        config: of the layer. If it hides later tokens the mask must, too, else it must not.
        remedy: what to do about a mask that a layer of the other kind would obey, for messages.

    Raises:
        ValueError: for a mask that hides or shows anything else than padding and later tokens: a
            hyper layer would not obey it.
    """
    lag, causal = _lags(seen), config.causal
    valid = seen.diagonal(dim1=1, dim2=2) if causal else seen.any(1)
    differs = seen != _shown(valid, lag, causal)
    if causal and config.window is not None:
        differs = differs & (lag < config.window)
    kind = "shows later tokens, or hides others than later ones and padding" if causal else "hides more than padding"
    message = f"attn_mask {kind}, which this {'causal' if causal else 'bidirectional'} hyper layer cannot obey"
    try:
        require(~(differs & valid[:, :, None]).any(), message)
    except ValueError as error:
        if not values_readable(seen, wait=True):
            raise
        raise ValueError(f"{error}: {_advice(seen, causal, remedy)}") from None
    return valid.expand(x.shape[0], -1)


def _lags(seen: Tensor) -> Tensor:
    rows = torch.arange(seen.shape[-1], device=seen.device)
    return rows[:, None] - rows


def _shown(valid: Tensor, lag: Tensor, causal: bool) -> Tensor:
    """What a causal or bidirectional layer reads of valid tokens, bool ``[B, 1 or T, T]``."""
    return (lag >= 0) & valid[:, None] if causal else valid[:, None]


def _advice(seen: Tensor, causal: bool, remedy: str) -> str:
    """What to do about a mask that a layer does not obey: what it is decides whether anything else would."""
    lag = _lags(seen)

    def is_mask(shown: Tensor, valid: Tensor) -> bool:
        return not bool(((seen != shown) & valid[:, :, None]).any())

    own = seen.diagonal(dim1=1, dim2=2)
    other = seen.any(1) if causal else own
    if remedy and is_mask(_shown(other, lag, not causal), other):
        return remedy
    width = int(torch.where(seen, lag, 0).max()) + 1
    if causal and is_mask(_shown(own, lag, True) & (lag < width), own):
        return f"it is a sliding window, so swap with max_lag={width}"
    together = seen | seen.mT
    kinds = {True: together & (lag >= 0), False: together}
    if bool((((together.float() @ together.float()) > 0) == together).all()):
        apart = "it keeps documents of one row apart, so give each document a row of its own, with padding"
        if is_mask(kinds[causal], own):
            return apart
        if remedy and is_mask(kinds[not causal], own):
            return f"{apart}, and {remedy}"
    return "no option of the swap does; restore_attention(model) and leave this module out (layers=...)"


def trimmed(valid: Tensor | None) -> Tensor | None:
    """None where all tokens are valid, which is faster."""
    if valid is None or not values_readable(valid, wait=True):
        return valid
    return None if bool(valid.all()) else valid
