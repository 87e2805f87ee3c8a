"""The backward's kernels compiled ahead of time, through their launch code, for architectures that are not here."""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed on this platform")

import report_backward
import triton
from report_forward import CONFIGURATIONS
from virtual_gpu import SHARED_MEMORY, virtual_gpu

from hypermlp_kernels import launch, launch_backward
from hypermlp_kernels.arguments import MixNeeds, Needs, Options, SequenceMix
from hypermlp_kernels.backward_tiles import BackwardTile, backward_tiles
from tests.quick import some

pytestmark = pytest.mark.skipif(launch.interpreted(), reason="TRITON_INTERPRET is set: nothing is compiled")
recorded = pytest.mark.skipif(
    not triton.__version__.startswith("3.7."), reason="the allowances are recorded for the code Triton 3.7 makes"
)
SMALL = BackwardTile(16, 16, 16, 16, 16, 1, 1)
ORDER = [
    "weight_gradient_kernel", "readout_statistic_gradient_kernel", "map_gradient_kernel",
    *["table_gradient_kernel"] * 2, *["turn_kernel", "key_product_kernel"] * 2,
]  # fmt: skip
ADD = ["add_parts_kernel"]
SPLIT_ORDER = [*ORDER[:2], *ADD, ORDER[2], *ADD, *ORDER[3:8], *ADD, ORDER[8]]


@recorded
@pytest.mark.parametrize("arch", some(["sm_80", "sm_90"], quick=["sm_90"]))
def test_preferred_tiles_keep_to_their_allowance(arch: str) -> None:
    for tile, used in report_backward.report(arch, "glu bf16", preferred_only=True):
        assert not report_backward.complaints(arch, "glu bf16", tile, used)
        assert used.shared <= SHARED_MEMORY[arch]
        assert used.loop["SHFL"] == 0, used.name


@recorded
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_tile_keeps_to_its_allowance(arch: str, name: str) -> None:
    for tile, used in report_backward.report(arch, name):
        assert not report_backward.complaints(arch, name, tile, used)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_86", "sm_100", "gfx942"])
def test_other_architectures_compile(arch: str) -> None:
    with virtual_gpu(arch) as gpu:
        for order, options in ((ORDER, {}), (SPLIT_ORDER, {"length": 256, "span": 1})):
            gpu.launches.clear()
            report_backward.call(**options)
            # gfx942's 64 KiB of shared memory do not hold the first tile: all start again with the second
            begun = len(gpu.launches) - len(order)
            assert gpu.launches[begun:] == order
            assert gpu.launches[:begun] == (order[:begun] if arch == "gfx942" else [])


def test_complaints_are_made() -> None:
    tile, used = next(report_backward.report("sm_90", "glu bf16", preferred_only=True))
    assert report_backward.complaints("sm_90", "glu bf16", tile, used._replace(stack=10**6))
    used.loop.clear()
    assert report_backward.complaints("sm_90", "glu bf16", tile, used)


@pytest.mark.parametrize("width", [16, 12])
def test_lengths_and_chunks_compile_once(width: int) -> None:
    """Whether numbers that go with the length are 1 or multiples of 16 makes no other kernel."""
    sizes = {"width": width, "values": 2 * width, "rank": width, "tile": SMALL}
    with virtual_gpu("sm_90") as gpu:
        for length in (1, 17, 48, 1000):
            gpu.launches.clear()
            report_backward.call(length, **sizes)
            assert gpu.launches == ORDER
        for length, span in ((17, 1), (64, 1), (300, 3), (48, 2)):
            gpu.launches.clear()
            report_backward.call(length, **sizes, span=span)
            assert gpu.launches == SPLIT_ORDER
        gpu.launches.clear()
        report_backward.call(48, **sizes, scratch_bytes=1)
        assert gpu.launches == ORDER * (2 * 48 // 16)
        assert len(gpu.compiled()) == len(report_backward.LAUNCHES)


def test_every_option_compiles() -> None:
    """One head, masks and packing, switches off: what the interpreter cannot tell, the compiler does."""
    q, v = torch.zeros(1, 20, 2, 12), torch.zeros(1, 20, 1, 20)
    rho, none = torch.ones(1, 20, 1), torch.zeros(1, 20, 1, 0)
    bare, scale = SequenceMix(None, None, None, None, True), SequenceMix(torch.zeros(2, 9), None, None, None, False)
    mask, bounds = torch.ones(1, 20, dtype=torch.bool), torch.tensor([0, 7, 20])
    nothing, low_rank = MixNeeds(False, False, False, False), MixNeeds(False, True, True, True)
    diag = nothing._replace(diag=True)
    with virtual_gpu("sm_90") as gpu:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x, y = q.to(dtype), v.to(dtype)
            launch_backward.backward(
                v, v, (torch.zeros(1, 20, 2, 0), rho, none), x, x, y, scale, bare,
                Needs(True, True, True, diag, nothing), Options("glu", True, 1e-12, True, "lag", 9),
                attention_mask=mask, cu_seqlens=bounds, tile=SMALL,
            )  # fmt: skip
        mix, z = (
            SequenceMix(None, *[torch.zeros(1, 20, 1)] * 2, torch.zeros(1, 20, 1, 1), False),
            torch.zeros(1, 20, 1, 1),
        )
        launch_backward.backward(
            v, v, (z, rho, z), q[:, :, :1], q[:, :, :1], v, mix, mix, Needs(True, True, True, low_rank, low_rank),
            Options("relu", False, 1e-12, False, "position", 20), tile=SMALL,
        )  # fmt: skip
        without = [x for x in ORDER if x != "readout_statistic_gradient_kernel"]
        without.remove("table_gradient_kernel")
        assert gpu.launches == without * 3 + ORDER


def test_a_tile_too_large_gives_way_to_a_smaller_one() -> None:
    """The preferred tiles do not fit sm_86's shared memory at a score width of 256: all kernels start again."""
    with virtual_gpu("sm_86") as gpu:
        report_backward.call(128, width=256, span=1)
        assert gpu.launches[-len(SPLIT_ORDER) :] == SPLIT_ORDER
        report_backward.call(width=256)
        assert gpu.launches[-len(ORDER) :] == ORDER
        assert len(gpu.launches) > len(ORDER)
        # those that fitted before one did not were launched with the larger tile, into scratch that is thrown away
        assert all(compiled.metadata.shared <= SHARED_MEMORY["sm_86"] for compiled in gpu.compiled()[-2:])


@pytest.mark.parametrize("value_width", [1, 16, 96, 1024])
def test_tiles_are_what_the_kernels_can_take(value_width: int) -> None:
    for precision, family in itertools.product(("bf16", "fp16", "tf32", "ieee"), ("ampere", "hopper")):
        for tile in backward_tiles(precision, value_width, family):
            assert tile.rows % tile.keys == 0
            assert all(size >= 16 and size & (size - 1) == 0 for size in tile[:5])
