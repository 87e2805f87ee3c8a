"""``hyper_attention``: the only door to the operator. Arguments are checked here and nowhere below."""

from __future__ import annotations

import logging
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from hypermlp.ops import checks, native
from hypermlp.ops.library import cast_for_autocast, chunked_forward
from hypermlp.ops.mixing import SequenceMix
from hypermlp.ops.modes import autocast_enabled, needs_plain_operators, without_autocast
from hypermlp.ops.reference import hyper_attention_reference
from hypermlp.ops.triton import check_available, triton_forward
from hypermlp.ops.varlen import within_bounds, zero_padded

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
            may be 0.
        k: keys, like ``q``.
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
            there is a compiler and the input is not float64, else chunked, until the GPU kernels have been
            run on a GPU. Under ``torch.func`` transforms, forward-mode differentiation, ``torch.jit.trace``
            and ``torch.onnx.export`` every choice takes the reference.

    Returns:
        ``o`` ``[B, T, H, V]`` in the dtype of ``q``. A row that sees a NaN or an infinity, in its own query or
        gates or in a key or value, is NaN in that head, and passes no gradient back to the inputs. No bit of a row
        that does not see it changes.

    Raises:
        ValueError, TypeError: naming the argument, its value and the remedy.
    """
    if selection not in _SELECTIONS:
        raise ValueError(f"selection must be one of {_SELECTIONS}, got {selection!r}")
    check_backend(backend)
    indexing = _resolve_layout(layout, causal)
    routing_mix = SequenceMix() if routing_mix is None else routing_mix
    readout_mix = SequenceMix() if readout_mix is None else readout_mix
    checks.check_kinds(q, k, v, routing_mix, readout_mix)
    q, k, v, routing_mix, readout_mix = _autocast(q, k, v, routing_mix, readout_mix)

    num_maps = 2 if selection == "glu" else 1
    checks.check_streams(q, k, v, num_maps)
    checks.check_eps(eps, q.dtype)
    checks.check_mix("routing_mix", routing_mix, q, q.shape[2])
    checks.check_mix("readout_mix", readout_mix, q, v.shape[2])
    max_lag = checks.table_rows(routing_mix, readout_mix, max_lag)
    if cu_seqlens is not None:
        checks.check_cu_seqlens(cu_seqlens, q)
    if indexing == "position" and max_lag is not None:
        checks.check_positions(q.shape[1], max_lag, cu_seqlens)
    if attention_mask is not None:
        attention_mask = checks.check_attention_mask(attention_mask, q)
        q, k, v, routing_mix, readout_mix = _without_padding(attention_mask, q, k, v, routing_mix, readout_mix)

    if 0 in q.shape[:2]:
        return _empty(v, q, k, *routing_mix[:4], *readout_mix[:4])
    path = _choose(backend, q)
    if path == "reference":
        inside = within_bounds(q.shape[1], cu_seqlens, q.device)
        if inside is not None:  # the other paths never touch tokens of no sequence; a dense product does
            q, k, v, routing_mix, readout_mix = _without_padding(inside, q, k, v, routing_mix, readout_mix)
        with without_autocast(q.device.type):
            o = hyper_attention_reference(
                q, k, v, routing_mix, readout_mix,
                selection=selection, norm=norm, eps=eps, causal=causal, layout=indexing, max_lag=max_lag,
                attention_mask=attention_mask, cu_seqlens=cu_seqlens,
            )  # fmt: skip
        o = zero_padded(o, inside)
    else:
        forward = {"chunked": chunked_forward, "native": native.native_forward, "triton": triton_forward}[path]
        o = forward(
            q, k, v, *routing_mix[:4], *readout_mix[:4], attention_mask, cu_seqlens,
            routing_mix.identity, readout_mix.identity, selection, norm, eps, causal, indexing, max_lag,
        )[0].to(q.dtype)  # fmt: skip
    return zero_padded(o, attention_mask)


def _resolve_layout(layout: str | None, causal: bool) -> str:
    if layout is None:
        return "lag" if causal else "position"
    if layout not in _LAYOUTS:
        raise ValueError(f"layout must be one of {_LAYOUTS} or None, got {layout!r}")
    if layout == "lag" and not causal:
        raise ValueError("layout='lag' needs causal=True: a key after the query has no lag; use layout='position'")
    return layout


def _empty(v: Tensor, *others: Tensor | None) -> Tensor:
    """The output without a token, with the gradient of all that it was made of: zeros."""
    zero = sum(x.sum().to(v.dtype) * 0 for x in others if x is not None)
    return v + zero


def _without_padding(
    valid: Tensor, q: Tensor, k: Tensor, v: Tensor, routing_mix: SequenceMix, readout_mix: SequenceMix
) -> tuple[Tensor, Tensor, Tensor, SequenceMix, SequenceMix]:
    """Everything along the tokens, with zeros in place of what padded tokens hold."""
    q, k, v = (zero_padded(x, valid) for x in (q, k, v))
    routing_mix, readout_mix = (
        mix if mix.gate is None else mix._replace(gate=zero_padded(mix.gate, valid))
        for mix in (routing_mix, readout_mix)
    )
    return q, k, v, routing_mix, readout_mix


def _autocast(
    q: Tensor, k: Tensor, v: Tensor, routing_mix: SequenceMix, readout_mix: SequenceMix
) -> tuple[Tensor, Tensor, Tensor, SequenceMix, SequenceMix]:
    """Inside an autocast region, the streams in its dtype; the tables keep their own precision."""
    device_type = q.device.type
    if not autocast_enabled(device_type):
        return q, k, v, routing_mix, readout_mix
    q, k, v = (cast_for_autocast(x, device_type) for x in (q, k, v))
    routing_mix, readout_mix = (
        mix._replace(gate=cast_for_autocast(mix.gate, device_type)) for mix in (routing_mix, readout_mix)
    )
    return q, k, v, routing_mix, readout_mix


def _choose(backend: str, q: Tensor) -> str:
    """The path to take. The reference is of PyTorch's own operators alone, which some modes need."""
    if needs_plain_operators():
        return "reference"
    if backend == "triton":
        check_available(q)
    path = "native" if native.chosen(backend, q) else "chunked"
    if backend != "auto":
        return backend
    # the Triton kernels have not yet been run on a GPU: until they have, they are taken on request alone
    if not torch.compiler.is_compiling():
        _say_once(q.device.type, path)
    return path


def check_backend(backend: str) -> None:
    """ValueError for a name that is no path."""
    if backend not in _BACKENDS:
        raise ValueError(f"backend must be one of {_BACKENDS}, got {backend!r}")


@cache
def _say_once(device_type: str, path: str) -> None:
    _logger.info("backend='auto' takes the %s path on %s", path, device_type)
