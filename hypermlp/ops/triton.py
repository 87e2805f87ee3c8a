"""The Triton path: the kernels of ``hypermlp_kernels`` as an operator of PyTorch.

Fused kernels, with memory linear in ``T``: the backward makes its maps again from the statistics that
the forward saved, in chunks of bounded size; one new token against a cache, for inference. Triton is
imported when the path is first taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hypermlp.ops.arguments import SCHEMA, Gradients, Needs, OperatorArgs, Options, Outputs, mixing, signature
from hypermlp.ops.decode import Past, StepArgs
from hypermlp.ops.modes import values_readable

# tensor cores for bfloat16, and asynchronous copies to shared memory
_MIN_CAPABILITY = (8, 0)


def unavailable(q: Tensor) -> str | None:
    """Why the kernels cannot take ``q``, or None if they can."""
    return _unavailable(q.device, q.dtype)


def _unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    try:
        import triton

        from hypermlp_kernels.interpreter import multiplies_bfloat16
        from hypermlp_kernels.launch import interpreted
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    if not hasattr(triton.language, "gather"):
        return f"the kernels need Triton 3.3, as PyTorch 2.7 has it, and this is {triton.__version__}"
    if interpreted():
        if dtype == torch.bfloat16 and not multiplies_bfloat16():
            return (
                "TRITON_INTERPRET=1 is set, and Triton's interpreter multiplies the bits of bfloat16 numbers as "
                "integers: use float32 or float16 there, or run without the variable on a GPU"
            )
        return None
    if device.type != "cuda":
        return f"the kernels need a GPU and the input is on {device} (or set TRITON_INTERPRET=1 to try them, slowly)"
    if dtype == torch.float64:
        return "the kernels take float16, bfloat16 and float32 and the input is float64"
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU here"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < _MIN_CAPABILITY:
        return "the kernels need compute capability 8.0 or later"
    return None


# a compiler takes the answer as it is, see native.py
_unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def forward(x: OperatorArgs) -> Outputs:
    """The operator, as :func:`hypermlp.ops.chunked.forward`. float32 follows PyTorch's matmul precision."""
    from hypermlp_kernels import launch

    return Outputs(*launch.forward(x.q, x.k, x.v, x.routing_mix, x.readout_mix, x.options, **keywords(x)))


def backward(grad_o: Tensor, outputs: Outputs, x: OperatorArgs, needs: Needs) -> Gradients:
    """Its gradients; None where none was asked for."""
    from hypermlp_kernels import launch_backward

    return launch_backward.backward(
        grad_o, outputs.o, outputs.statistics, x.q, x.k, x.v, x.routing_mix, x.readout_mix, needs, x.options,
        **keywords(x),
    )  # fmt: skip


def keywords(x: OperatorArgs) -> dict[str, Any]:
    """What the kernels' host functions take by name."""
    return {
        "attention_mask": x.tokens.valid,
        "cu_seqlens": x.tokens.cu_seqlens,
        "allow_tf32": torch.get_float32_matmul_precision() != "highest",
    }


def short_conv() -> ModuleType:
    """The kernels of the short convolution."""
    from hypermlp_kernels import launch_short_conv

    return launch_short_conv


Step = Callable[[StepArgs], Tensor]
_PLACES = {"valid": "Tensor?", "start": "Tensor?", "length": "Tensor?"}
# a step is causal, and knows its layout by the places
_STEP = {"q": "Tensor", "keys": "Tensor[]", "values": "Tensor[]", **_PLACES} | {
    name: kind for name, kind in SCHEMA.items() if name.startswith(("routing", "readout"))
} | {name: SCHEMA[name] for name in ("selection", "norm", "eps", "max_lag")}  # fmt: skip


def decode_step(x: StepArgs) -> Tensor:
    """``o`` ``[B, H*V]`` of the newest token, as :func:`hypermlp.ops.decode.decode_step`; no gradient."""
    # the operator is for tracing: called directly, a step is spared its dispatch
    return _decode(x) if values_readable(x.q, wait=True) else run_step(triton_decode, x)


def _decode(x: StepArgs) -> Tensor:
    from hypermlp_kernels.launch_decode import decode

    q, past, routing_mix, readout_mix, options = x
    batch, width = q.shape[0], past.keys[0].shape[1]
    # the kernels take dimensions of their own for heads and time
    routing_mix, readout_mix = (
        mix if mix.core is None else mix._replace(core=mix.core.unsqueeze(1)) for mix in (routing_mix, readout_mix)
    )
    o = decode(
        q.reshape(batch, 1, -1, width),
        [part.view(batch, -1, *part.shape[1:]).mT for part in past.keys],
        [part.view(batch, -1, *part.shape[1:]) for part in past.values],
        routing_mix,
        readout_mix,
        options,
        valid=past.valid,
        start=past.start,
        length=past.length,
    )
    return o.reshape(batch, -1)


def step_operator(name: str, compute: Step) -> Any:
    """``hypermlp::<name>``: a step as an operator of PyTorch, for :func:`run_step`."""

    def flat_step(*flat: Any) -> Tensor:
        named = dict(zip(_STEP, flat, strict=True))
        past = Past(named["keys"], named["values"], *(named[place] for place in _PLACES))
        layout = "lag" if past.start is None else "position"
        options = Options(named["selection"], named["norm"], named["eps"], True, layout, named["max_lag"])
        return compute(StepArgs(named["q"], past, mixing(named, "routing"), mixing(named, "readout"), options))

    operator = torch.library.custom_op(
        f"hypermlp::{name}", flat_step, mutates_args=(), schema=f"({signature(_STEP)}) -> Tensor"
    )

    @operator.register_fake
    def _(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], *args: object) -> Tensor:
        return q.new_empty(q.shape[0], values[0].shape[0] // q.shape[0] * values[0].shape[2])

    return operator


def run_step(operator: Any, x: StepArgs) -> Tensor:
    """What ``operator`` makes of a step."""
    q, past, routing_mix, readout_mix, options = x
    o: Tensor = operator(
        q, past.keys, past.values, past.valid, past.start, past.length, *routing_mix.tensors, *readout_mix.tensors,
        routing_mix.identity, readout_mix.identity, options.selection, options.norm, options.eps, options.max_lag,
    )  # fmt: skip
    return o


triton_decode = step_operator("triton_decode", _decode)
