"""The Triton path: the kernels of ``hypermlp_kernels`` as an operator of PyTorch.

Forward in fused kernels with memory linear in ``T``; backward through the chunked path, from the
statistics that the kernels saved. Triton is imported when the path is first taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hypermlp.ops.library import forward_operator
from hypermlp.ops.mixing import SequenceMix
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
        return f"the kernels need a GPU and q is on {q.device} (or set TRITON_INTERPRET=1 to try them, slowly)"
    if q.dtype == torch.float64:
        return "the kernels take float16, bfloat16 and float32 and q is float64"
    if torch.version.hip is None and torch.cuda.get_device_capability(q.device) < _MIN_CAPABILITY:
        return "the kernels need compute capability 8.0 or later"
    return None


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
        glu=options.selection == "glu",
        norm=options.norm,
        eps=options.eps,
        causal=options.causal,
        by_lag=options.layout == "lag",
        max_lag=options.max_lag,
        attention_mask=attention_mask,
        cu_seqlens=cu_seqlens,
        allow_tf32=torch.get_float32_matmul_precision() != "highest",
    )


triton_forward = forward_operator("triton_forward", forward)
