"""The native path: the C++ kernels of ``hypermlp_kernels.native`` as an operator of PyTorch, for CPUs.

Compiled on first use by the system's C++ compiler, and imported then. float32 is computed in float32; bfloat16 and
float16 are converted as they are read; float64 takes the same sources compiled for it.
"""

from __future__ import annotations

import logging
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from hypermlp.ops import chunked, decode
from hypermlp.ops.chunked_backward import Needs
from hypermlp.ops.decode import Past
from hypermlp.ops.library import backward_operator, chunked_backward_of, forward_operator
from hypermlp.ops.mixing import SequenceMix
from hypermlp.ops.modes import values_readable
from hypermlp.ops.nonfinite import Spans, made_finite
from hypermlp.ops.tiling import Options
from hypermlp.ops.varlen import segments

_logger = logging.getLogger("hypermlp")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def unavailable(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot take such an input, or None if they can. Builds them, the first time."""
    if device_type not in ("cpu", "meta"):
        return f"the kernels are for a CPU and the input is on {device_type}"
    return _why_not_built(torch.promote_types(dtype, torch.float32))


@cache
def _why_not_built(dtype: torch.dtype) -> str | None:
    from hypermlp_kernels.native.build import UnavailableError, library

    try:
        library(dtype)
    except UnavailableError as error:
        _logger.info("the native path is not there: %s", error)
        return str(error)
    return None


def check_available(q: Tensor) -> None:
    """ValueError where the kernels cannot take ``q``."""
    reason = unavailable(q.device.type, q.dtype)
    if reason is not None:
        raise ValueError(f"backend='native' cannot run here: {reason}; backend='auto' takes what can")


def chosen(backend: str, q: Tensor) -> bool:
    """Whether ``backend`` takes this path for ``q``; ``"auto"`` does on a CPU, float64 excepted."""
    if backend == "native":
        check_available(q)
        return True
    return backend == "auto" and q.device.type == "cpu" and q.dtype != torch.float64 and not unavailable("cpu", q.dtype)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routing_mix: SequenceMix,
    readout_mix: SequenceMix,
    options: Options,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(o, z1, rho, z2)``, as :func:`hypermlp.ops.chunked.forward`."""
    if unavailable(q.device.type, q.dtype) is not None:
        # a program that was exported where there was a compiler
        return chunked.forward(q, k, v, routing_mix, readout_mix, options, attention_mask, cu_seqlens)
    from hypermlp_kernels.native import launch

    o, z1, rho, z2, nonfinite = launch.forward(
        q, k, v, launch.Mix(*routing_mix), launch.Mix(*readout_mix), **_keywords(k, options, attention_mask, cu_seqlens)
    )
    if not nonfinite:
        return o, z1, rho, z2
    streams, marked = made_finite(q, k, v, routing_mix, readout_mix, _spans(k, options, cu_seqlens))
    o, z1, rho, z2 = forward(*streams, options, attention_mask, cu_seqlens)
    return o.masked_fill_(marked.unsqueeze(-1), float("nan")), z1, rho, z2


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
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of ``q, k, v`` and of both mixings' tensors, in order; None where none was asked for."""
    if unavailable(q.device.type, q.dtype) is not None:
        return chunked_backward_of(
            grad_o, o, statistics, q, k, v, routing_mix, readout_mix, needs, options, attention_mask, cu_seqlens
        )
    from hypermlp_kernels.native import launch

    grads, nonfinite = launch.backward(
        grad_o, o, statistics, q, k, v, launch.Mix(*routing_mix), launch.Mix(*readout_mix),
        launch.Needs(needs.q, needs.k, needs.v, *(launch.MixNeeds(*mix) for mix in needs[3:])),
        **_keywords(k, options, attention_mask, cu_seqlens),
    )  # fmt: skip
    if not nonfinite:
        return grads
    streams, marked = made_finite(q, k, v, routing_mix, readout_mix, _spans(k, options, cu_seqlens))
    grad_o, o = (x.masked_fill(marked.unsqueeze(-1), 0) for x in (grad_o, o))
    return backward(grad_o, o, statistics, *streams, needs, options, attention_mask, cu_seqlens)


def _spans(k: Tensor, options: Options, cu_seqlens: Tensor | None) -> Spans:
    return partial(options.key_spans, k.shape[1], cu_seqlens, k.device)


def _keywords(k: Tensor, options: Options, attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> dict[str, Any]:
    from hypermlp_kernels.native import launch

    return {
        "options": launch.Options(
            options.selection == "glu", options.norm, options.eps, options.causal, options.layout == "lag",
            options.window,
        ),
        "spans": [launch.Span(*x) for x in segments(attention_mask, cu_seqlens, *k.shape[:2])],
        "attention_mask": attention_mask,
    }  # fmt: skip


native_backward = backward_operator("native_backward", backward)
native_forward = forward_operator("native_forward", forward, native_backward)


def decode_step(q: Tensor, past: Past, routing_mix: SequenceMix, readout_mix: SequenceMix, options: Options) -> Tensor:
    """``o`` ``[B, H*V]`` of the newest token, as :func:`hypermlp.ops.decode.decode_step`; no gradient.

    A compiled graph takes PyTorch's own operators, as does whatever has no values to compute with.
    """
    if not q.shape[0] or not values_readable(q, *past.keys, *past.values):
        return decode.decode_step(q, past, routing_mix, readout_mix, options)
    from hypermlp_kernels.native import launch, launch_step

    return launch_step.step(
        q, past.keys, past.values, launch.Mix(*routing_mix), launch.Mix(*readout_mix),
        glu=options.selection == "glu", norm=options.norm, eps=options.eps,
        valid=past.valid, start=past.start, length=past.length,
    ).to(q.dtype)  # fmt: skip
