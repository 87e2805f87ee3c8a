"""The native path: the C++ kernels of ``hypermlp_kernels.native`` as an operator of PyTorch, for CPUs.

Compiled on first use by the system's C++ compiler; imported then, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hypermlp.ops.chunked_backward import Needs
from hypermlp.ops.mixing import SequenceMix
from hypermlp.ops.tiling import Options
from hypermlp.ops.varlen import key_spans, sees_nonfinite, segments


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
    from hypermlp_kernels.native import launch

    *found, nonfinite = launch.forward(
        q, k, v, launch.Mix(*routing_mix), launch.Mix(*readout_mix), **_keywords(k, options, attention_mask, cu_seqlens)
    )
    if nonfinite:
        spans = key_spans(
            k.shape[1], causal=options.causal, max_lag=options.window, cu_seqlens=cu_seqlens, device=q.device
        )
        found[0].masked_fill_(sees_nonfinite(v, *spans)[:, k.shape[1] - q.shape[1] :], float("nan"))
    return tuple(found)


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
    from hypermlp_kernels.native import launch

    return launch.backward(
        grad_o, o, statistics, q, k, v, launch.Mix(*routing_mix), launch.Mix(*readout_mix),
        launch.Needs(needs.q, needs.k, needs.v, *(launch.MixNeeds(*mix) for mix in needs[3:])),
        **_keywords(k, options, attention_mask, cu_seqlens),
    )  # fmt: skip


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
