"""Gradients of a case: by the kernels, and by autograd through the reference."""

import torch
from cases import TOLERANCE, Case, error

from hypermlp.ops import SequenceMix
from hypermlp.ops.reference import hyper_attention_reference
from hypermlp.ops.varlen import zero_padded
from hypermlp_kernels import launch_backward
from hypermlp_kernels.arguments import Needs
from hypermlp_kernels.backward_tiles import BackwardTile

NAMES = ("q", "k", "v", *(f"{mix}.{x}" for mix in ("routing", "readout") for x in ("diag", "down", "up", "core")))


def inputs(case: Case) -> list[torch.Tensor | None]:
    return [case.q, case.k, case.v, *(x for mix in case.mixes for x in mix.tensors)]


def output_gradient(case: Case) -> torch.Tensor:
    rng = torch.Generator().manual_seed(1)
    grad_o = torch.randn(case.v.shape, generator=rng, dtype=torch.float64).to(case.dtype).to(case.v.device)
    return zero_padded(grad_o, case.mask_tensor)


def by_kernels(
    case: Case, asked: set[str] | None = None, forward: tuple[torch.Tensor, ...] | None = None, **options
) -> dict[str, torch.Tensor]:
    """Gradients ``asked`` for, all by default, from what the ``forward`` kernels make: anew if it is not given."""
    o, *statistics = case.kernels() if forward is None else forward
    present = [name for name, x in zip(NAMES, inputs(case), strict=True) if x is not None]
    wanted = [name in (present if asked is None else asked) for name in NAMES]
    if case.tile is not None:
        options.setdefault("tile", BackwardTile(case.tile.rows, case.tile.keys, 32, 16, 16, 1, 1))
    found = launch_backward.backward(
        output_gradient(case).to(o.dtype), o, tuple(statistics),
        case.q, case.k, case.v, *case.mixes, Needs.of(wanted), case.options,
        attention_mask=case.mask_tensor, cu_seqlens=case.cu_seqlens, **options,
    ).flat  # fmt: skip
    assert [x is not None for x in found] == wanted
    return {name: x for name, x in zip(NAMES, found, strict=True) if x is not None}


def by_reference(case: Case, compute_dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Through the equations; with a low ``compute_dtype``, what PyTorch makes of them in that precision."""
    low = compute_dtype in (torch.bfloat16, torch.float16)
    leaves = {
        name: (x if low else x.to(compute_dtype)).detach().requires_grad_()
        for name, x in zip(NAMES, inputs(case), strict=True)
        if x is not None
    }
    mixes = (
        SequenceMix(*(leaves.get(f"{name}.{x}") for x in ("diag", "down", "up", "core")), mix.identity)
        for name, mix in zip(("routing", "readout"), case.mixes, strict=True)
    )
    o = hyper_attention_reference(
        leaves["q"], leaves["k"], leaves["v"], *mixes,
        selection=case.selection, norm=case.norm, eps=1e-12, causal=case.causal, layout=case.layout,
        max_lag=case.max_lag, attention_mask=case.mask_tensor, cu_seqlens=case.cu_seqlens, compute_dtype=compute_dtype,
    )  # fmt: skip
    found = torch.autograd.grad(o, list(leaves.values()), output_gradient(case).to(o.dtype))
    return dict(zip(leaves, found, strict=True))


def errors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    assert list(actual) == list(expected)
    assert all(actual[name].shape == x.shape for name, x in expected.items())
    return {name: error(actual[name], x) for name, x in expected.items()}


def wrong(case: Case, found: dict[str, torch.Tensor], comparable: bool = True) -> dict[str, float]:
    """Errors that are too large: in half precision, where PyTorch is ``comparable``, over twice what it loses there."""
    expected = by_reference(case)
    measured = errors(found, expected)
    allowed = dict.fromkeys(measured, TOLERANCE[case.dtype])
    if case.dtype in (torch.bfloat16, torch.float16) and comparable:
        allowed = {name: 2 * loss for name, loss in errors(by_reference(case, case.dtype), expected).items()}
    return {name: x for name, x in measured.items() if not x < allowed[name]}


def same_bits(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Whether they are equal, NaN and NaN too."""
    integer = {torch.float32: torch.int32, torch.float64: torch.int64}
    return list(actual) == list(expected) and all(
        torch.equal(x.view(integer[x.dtype]), expected[name].view(integer[x.dtype])) for name, x in actual.items()
    )
