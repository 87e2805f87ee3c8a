"""The short convolution's kernels compiled ahead of time through their real launch code, and run in the emulator."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed on this platform")

import report_short_conv
import report_table
import triton
from emulator.device import emulated_gpu
from report_short_conv import call
from virtual_gpu import virtual_gpu

from hypermlp.ops.short_conv import short_conv
from hypermlp.ops.varlen import sequence_starts, sequence_stops
from hypermlp_kernels import launch, launch_short_conv
from tests.quick import some

pytestmark = pytest.mark.skipif(launch.interpreted(), reason="TRITON_INTERPRET is set: nothing is compiled")
recorded = pytest.mark.skipif(
    not triton.__version__.startswith("3.7."), reason="what is allowed is recorded for the code Triton 3.7 makes"
)
BOTH = ["short_conv_kernel", "short_conv_backward_kernel"]


@recorded
@pytest.mark.parametrize("arch", some(["sm_80", "sm_90"], quick=["sm_90"]))
@pytest.mark.parametrize(
    "name",
    [
        name if name == "conv bf16" else pytest.param(name, marks=pytest.mark.slow)
        for name in report_short_conv.CONFIGURATIONS
    ],
)
def test_kernels_keep_to_their_allowance(arch: str, name: str) -> None:
    for used in report_short_conv.report(arch, name):
        assert not report_table.spills_of(arch, name, used, report_table.ALLOWED_STACK)
        assert used.shared <= 8192


def test_complaints_are_made() -> None:
    used = next(iter(report_short_conv.report("sm_90", "conv bf16")))
    assert report_table.spills_of("sm_90", "conv bf16", used._replace(stack=8), {})


@pytest.mark.parametrize("channels", [64, 33])
def test_any_length_compiles_once(channels: int) -> None:
    with virtual_gpu("sm_90") as gpu:
        for length, past, batch in ((1, 3, 1), (16, 3, 1), (100, 3, 2), (33, 0, 3), (256, 16, 16), (1, 0, 1)):
            call(length, channels=channels, past=past, batch=batch)
        assert gpu.launches == BOTH * 6
        assert len(gpu.compiled()) == len(BOTH)


def test_tokens_are_moved_in_vectors() -> None:
    with virtual_gpu("sm_90") as gpu:
        call()
        forward, backward = (compiled.asm["ptx"] for compiled in gpu.compiled())
    # 32 numbers a thread are four vectors of 16 bytes: at every reach, and the backward's own input
    assert forward.count("ld.global.v4.b32") == 4 * 4
    assert backward.count("ld.global.v4.b32") == 5 * 4
    assert forward.count("st.global.v4.b32") == backward.count("st.global.v4.b32") == 4


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_a_gradient_that_is_not_needed_is_not_stored(needs: tuple[bool, bool]) -> None:
    with virtual_gpu("sm_90") as gpu:
        call(needs_x=needs[0], needs_taps=needs[1])
        backward = gpu.compiled()[1].asm["ptx"]
    assert ("st.global.v4.b32" in backward, "st.global.b32" in backward) == needs
    assert backward.count("ld.global.v4.b32") == (4 + needs[1]) * 4


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_100", "gfx942"])
def test_other_architectures_compile(arch: str) -> None:
    with virtual_gpu(arch) as gpu:
        call(size=1, dtype=torch.float16)
        call(size=7, packed=True, channels=20)
        assert gpu.launches == BOTH * 2


EMULATED = {
    "plain": {},
    "past": {"past": 3, "channels": 7},
    "packed": {"bounds": [0, 3, 60, 140]},
    "float32": {"dtype": torch.float32, "channels": 24},
}


@pytest.mark.parametrize("name", EMULATED)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_compiled_code_gives_what_float64_gives(arch: str, name: str) -> None:
    """Two blocks of tokens, in the emulator."""
    emulate(arch, **EMULATED[name])


def emulate(
    arch: str, length: int = 140, channels: int = 32, past: int = 0, bounds: list[int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:  # fmt: skip
    x, taps = torch.randn(1, past + length, channels).to(dtype), torch.randn(channels, 4).to(dtype)
    weight = torch.randn(1, length, channels).to(dtype)
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    starts, stops = (
        None if cu_seqlens is None else find(length, cu_seqlens, x.device) for find in (sequence_starts, sequence_stops)
    )
    with emulated_gpu(arch) as launches:
        y = launch_short_conv.forward(x, taps, past=past, starts=starts)
        grads = launch_short_conv.backward(weight, x, taps, past=past, stops=stops)
    assert [one.name for one in launches] == BOTH
    assert not any(one.mistakes for one in launches)
    exact_x, exact_taps = x.double().requires_grad_(), taps.double().requires_grad_()
    before = exact_x[:, :past] if past else None
    exact = short_conv(exact_x[:, past:], exact_taps, cu_seqlens, before, "reference")
    wanted = (exact, *torch.autograd.grad(exact, (exact_x, exact_taps), weight.double()))
    for ours, truth in zip((y, *grads), wanted, strict=True):
        # one rounding of the result, and of float32 sums
        assert (ours.double() - truth).abs().max() <= 2 * torch.finfo(dtype).eps * truth.abs().max()
