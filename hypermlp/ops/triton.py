"""The Triton path: the kernels of ``hypermlp_kernels`` as an operator of PyTorch.

Fused kernels, with memory linear in ``T``: the backward makes its maps again from the statistics that
the forward saved, in chunks of bounded size; one new token against a cache, for inference. Triton is
imported when the path is first taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hypermlp.ops.chunked_backward import Needs
from hypermlp.ops.decode import Past
from hypermlp.ops.library import backward_operator, forward_operator
from hypermlp.ops.mixing import SequenceMix
from hypermlp.ops.modes import values_readable
from hypermlp.ops.tiling import Options

# tensor cores for bfloat16, and asynchronous copies to shared memory
_MIN_CAPABILITY = (8, 0)


def unavailable(q: Tensor) -> str | None:
    """Why the kernels cannot take ``q``, or None if they can."""
    try:
        from hypermlp_kernels.launch import interpreted
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    if interpreted():
        return None
    if q.device.type != "cuda":
        return f"the kernels need a GPU and the input is on {q.device} (or set TRITON_INTERPRET=1 to try them, slowly)"
    if q.dtype == torch.float64:
        return "the kernels take float16, bfloat16 and float32 and the input is float64"
    if torch.version.hip is None and torch.cuda.get_device_capability(q.device) < _MIN_CAPABILITY:
        return "the kernels need compute capability 8.0 or later"
    return None


def check_available(q: Tensor) -> None:
    """ValueError where the kernels cannot take ``q``."""
    reason = unavailable(q)
    if reason is not None:
        raise ValueError(f"backend='triton' cannot run here: {reason}; backend='auto' takes what can")


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
    """``(o, z1, rho, z2)``, as :func:`hypermlp.ops.chunked.forward`. float32 follows PyTorch's matmul precision."""
    from hypermlp_kernels import launch

    return launch.forward(
        q,
        k,
        v,
        launch.Mix(*routing_mix),
        launch.Mix(*readout_mix),
        **_keywords(options, attention_mask, cu_seqlens),
    )


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
    from hypermlp_kernels import backward_plan, launch, launch_backward

    routing_needs, readout_needs = (backward_plan.MixNeeds(*mix) for mix in needs[3:])
    return launch_backward.backward(
        grad_o,
        o,
        statistics,
        q,
        k,
        v,
        launch.Mix(*routing_mix),
        launch.Mix(*readout_mix),
        backward_plan.Needs(needs.q, needs.k, needs.v, routing_needs, readout_needs),
        **_keywords(options, attention_mask, cu_seqlens),
    )


def _keywords(options: Options, attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> dict[str, Any]:
    return {
        "glu": options.selection == "glu",
        "norm": options.norm,
        "eps": options.eps,
        "causal": options.causal,
        "by_lag": options.layout == "lag",
        "max_lag": options.max_lag,
        "attention_mask": attention_mask,
        "cu_seqlens": cu_seqlens,
        "allow_tf32": torch.get_float32_matmul_precision() != "highest",
    }


triton_backward = backward_operator("triton_backward", backward)
triton_forward = forward_operator("triton_forward", forward, triton_backward)


def decode_step(q: Tensor, past: Past, routing_mix: SequenceMix, readout_mix: SequenceMix, options: Options) -> Tensor:
    """``o`` ``[B, H*V]`` of the newest token, as :func:`hypermlp.ops.decode.decode_step`; no gradient."""
    check_available(q)
    # the operator is for tracing: called directly, a step is spared its dispatch
    run = _decode if values_readable(q, wait=True) else triton_decode
    return run(
        q, past.keys, past.values, past.valid, past.start, past.length, *routing_mix[:4], *readout_mix[:4],
        routing_mix.identity, readout_mix.identity, options.selection, options.norm, options.eps, options.max_lag,
    )  # fmt: skip


def _decode(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    valid: Tensor | None,
    start: Tensor | None,
    length: Tensor | None,
    routing_diag: Tensor | None,
    routing_down: Tensor | None,
    routing_up: Tensor | None,
    routing_gate: Tensor | None,
    readout_diag: Tensor | None,
    readout_down: Tensor | None,
    readout_up: Tensor | None,
    readout_gate: Tensor | None,
    routing_identity: bool,
    readout_identity: bool,
    selection: str,
    norm: bool,
    eps: float,
    max_lag: int | None,
) -> Tensor:
    from hypermlp_kernels.launch import Mix
    from hypermlp_kernels.launch_decode import decode

    batch, width = q.shape[0], keys[0].shape[1]
    # the kernels take dimensions of their own for heads and time
    routing_gate, readout_gate = (x if x is None else x.unsqueeze(1) for x in (routing_gate, readout_gate))
    o = decode(
        q.reshape(batch, 1, -1, width),
        [part.view(batch, -1, *part.shape[1:]).mT for part in keys],
        [part.view(batch, -1, *part.shape[1:]) for part in values],
        Mix(routing_diag, routing_down, routing_up, routing_gate, routing_identity),
        Mix(readout_diag, readout_down, readout_up, readout_gate, readout_identity),
        glu=selection == "glu",
        norm=norm,
        eps=eps,
        max_lag=max_lag,
        valid=valid,
        start=start,
        length=length,
    )
    return o.reshape(batch, -1)


triton_decode = torch.library.custom_op("hypermlp::triton_decode", _decode, mutates_args=())


@triton_decode.register_fake
def _(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], *args: object) -> Tensor:
    return q.new_empty(q.shape[0], values[0].shape[0] // q.shape[0] * values[0].shape[2])
