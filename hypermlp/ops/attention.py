"""``hyper_attention``: the door to the operator. What it is given is checked here and nowhere below.

Layers have a door of their own, for hidden states, masks and bounds; with what they make of them they call
:func:`attend`.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from hypermlp.checks import as_flag
from hypermlp.ops import checks, reference
from hypermlp.ops.arguments import OperatorArgs, Options, SequenceMix
from hypermlp.ops.checked import NAME
from hypermlp.ops.library import PATHS, Path, cast_for_autocast, run
from hypermlp.ops.modes import autocast_enabled, without_autocast
from hypermlp.ops.paths import choose
from hypermlp.ops.varlen import ALL_TOKENS

Selection = Literal["glu", "relu"]
LagOrPosition = Literal["lag", "position"]
Backend = Literal["auto", "reference", "chunked", "native", "triton"]
# at import: a compiler of torch 2.6 does not trace get_args
_SELECTIONS, _BACKENDS, _LAYOUTS = get_args(Selection), get_args(Backend), get_args(LagOrPosition)

_logger = logging.getLogger("hypermlp")


def hyper_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routing_mix: SequenceMix | None = None,
    readout_mix: SequenceMix | None = None,
    *,
    selection: Selection = "glu",
    norm: bool = True,
    eps: float = 1e-12,
    causal: bool = True,
    layout: LagOrPosition | None = None,
    max_lag: int | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Scores, sequence mixing, selection and readout of HyperMLP and HyperGLU heads.

    ``docs/mathematics.md`` is the definition (Lu & Yang, arXiv 2602.12601). ``S`` is the number
    of score maps a head has: 2 for ``"glu"`` (along the head axis the ``H`` gate maps come
    first, then the ``H`` scale maps), 1 for ``"relu"``.

    Args:
        q: queries ``[B, T, S*H, K]``, float16, bfloat16, float32 or float64. Scores are not scaled. ``B`` and ``T``
            may be 0. They, and the mixings' cores, may be of the last ``m`` tokens alone, ``[B, m, S*H, K]``: the
            output is those tokens', and masks and bounds still count all ``T``. The Triton kernels have no such form.
        k: keys ``[B, T, S*H, K]``.
        v: values ``[B, T, H, V]``.
        routing_mix: first sequence mixing, over ``S*H`` heads; None is the identity.
        readout_mix: second sequence mixing, over ``H`` heads; None is the identity.
        selection: ``"glu"``: softplus(scale) * relu(gate). ``"relu"``: relu(gate).
        norm: divide each row by the L2 norm of its gate map.
        eps: smallest value that norm may take; no gradient flows through it there. From the smallest normal
            number of the precision of the computation on: 1.2e-38 unless the inputs are float64.
        causal: hide keys after the query.
        layout: what table rows stand for: ``"lag"`` (causal only) or ``"position"`` in the
            sequence. None: by lag if causal, else by position.
        max_lag: number of lags a query reaches back over, itself included. None takes the
            tables' rows, or no limit without tables. By lag, a longer sequence is an exact
            sliding window; by position, a sequence may not be longer.
        attention_mask: bool or integer ``[B, T]``, 1 for a valid token. A padded token is as if
            it did not exist and gets a zero output; one inside a sequence keeps its place.
        cu_seqlens: bounds of packed sequences, int32 or int64 ``[N + 1]`` within 0 and ``T``, never decreasing,
            with ``B = 1``. Equal neighbours are an empty sequence; tokens before the first bound and from the
            last one on are padding. A mask given as well still hides tokens.
        backend: ``"reference"`` (dense, any order of derivative), ``"chunked"`` (memory linear
            in ``T``), ``"native"`` (likewise, in C++ for CPUs; built by the system's compiler on first
            use), ``"triton"`` (fused GPU kernels, likewise linear), or ``"auto"``: native on a CPU where
            there is a compiler and the input is not float64; triton on a GPU where the kernels that the call needs
            pass a self-check, made once in a process for each kind of them; else chunked. Under
            ``torch.func`` transforms, forward-mode differentiation, ``torch.jit.trace`` and
            ``torch.onnx.export`` every choice takes the reference.

    Returns:
        ``o`` ``[B, T, H, V]``, or ``[B, m, H, V]``, in the dtype of ``q``. A row that sees a NaN or an infinity, in
        its own query or cores or in a key or value, is NaN in that head, and passes no gradient back to the inputs.
        No bit of a row that does not see it changes.

    Raises:
        ValueError, TypeError: naming the argument, its value and the remedy.
    """
    if selection not in _SELECTIONS:
        raise ValueError(f"selection must be one of {_SELECTIONS}, got {selection!r}")
    check_backend(backend)
    norm, causal = as_flag("norm", norm), as_flag("causal", causal)
    options = Options(selection, norm, eps, causal, _resolve_layout(layout, causal), max_lag)
    routing_mix = SequenceMix() if routing_mix is None else routing_mix
    readout_mix = SequenceMix() if readout_mix is None else readout_mix
    x = OperatorArgs(q, k, v, routing_mix, readout_mix, ALL_TOKENS, options)
    checks.check_kinds(x)
    x = _fitting(x._replace(tokens=checks.tokens(k, attention_mask, cu_seqlens)))
    if 0 in x.q.shape[:2]:
        return _empty(x)
    path = _chosen(backend, x)
    # tokens of no sequence are never touched by a path of our own; a dense product does
    zeroed = x.tokens.zeroed if path is None else x.tokens.masked_zeroed
    length = x.k.shape[1]
    return zeroed(_by(path, x.map_streams(lambda y: zeroed(y, length - y.shape[1]))), x.past)


def attend(x: OperatorArgs, backend: Backend) -> Tensor:
    """What :func:`hyper_attention` returns, of a layer's streams and of tokens that its door has checked.

    Keys and values of masked tokens hold zeros, and nothing of padding comes from what its hidden states held. The
    output of padding means nothing, and no gradient may come to it.
    """
    x = _fitting(x)
    return _empty(x) if 0 in x.q.shape[:2] else _by(_chosen(backend, x), x)


def _fitting(x: OperatorArgs) -> OperatorArgs:
    """``x`` in autocast's precision, if what it is made of fits together."""
    return checks.checked(cast_for_autocast(x) if autocast_enabled(x.q.device.type) else x)


def _chosen(backend: Backend, x: OperatorArgs) -> Path | None:
    path = choose(backend, x.q)
    if path is not None and not path.takes_blocks and x.past:
        if backend != "auto":
            raise ValueError(
                f"backend={backend!r} takes a query for every key, and q has {x.q.shape[1]} of {x.k.shape[1]} tokens: "
                "its kernels have no offset of queries; use backend='auto' or 'chunked'"
            )
        path = PATHS["chunked"]
    if backend == "auto" and path is not None and not torch.compiler.is_compiling():
        _say_once(x.q.device.type, path.name if path.name != NAME else "triton (where checked, else chunked)")
    return path


def _by(path: Path | None, x: OperatorArgs) -> Tensor:
    if path is not None:
        return run(path, x)
    with without_autocast(x.q.device.type):
        return reference.forward(x)


def _resolve_layout(layout: str | None, causal: bool) -> str:
    if layout is None:
        return "lag" if causal else "position"
    if layout not in _LAYOUTS:
        raise ValueError(f"layout must be one of {_LAYOUTS} or None, got {layout!r}")
    if layout == "lag" and not causal:
        raise ValueError("layout='lag' needs causal=True: a key after the query has no lag; use layout='position'")
    return layout


def _empty(x: OperatorArgs) -> Tensor:
    """The output without a token, with the gradient of all that it was made of: zeros."""
    return x.v[:, x.past :] + sum(y.sum().to(x.v.dtype) * 0 for y in x.tensors if y is not None)


def check_backend(backend: str) -> None:
    """ValueError for a name that is no path."""
    if backend not in _BACKENDS:
        raise ValueError(f"backend must be one of {_BACKENDS}, got {backend!r}")


@cache
def _say_once(device_type: str, path: str) -> None:
    _logger.info("backend='auto' takes the %s path on %s", path, device_type)
