"""The kernels compiled ahead of time, through their real launch code, for architectures that are not here."""

import itertools
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed on this platform")
sys.path.insert(0, str(Path(__file__).parents[2] / "kernels/tools"))

import report
import triton
from virtual_gpu import SHARED_MEMORY, virtual_gpu

from hypermlp_kernels import launch
from hypermlp_kernels.tiles import KERNELS, Tile, tiles

pytestmark = pytest.mark.skipif(launch.interpreted(), reason="TRITON_INTERPRET is set: nothing is compiled")
ALL = ["routing_statistic_kernel", "selection_statistics_kernel", "readout_kernel"]
recorded = pytest.mark.skipif(
    not triton.__version__.startswith("3.7."), reason="the allowances are recorded for the code Triton 3.7 makes"
)
SMALL = dict.fromkeys(KERNELS, Tile(16, 16, 16, 1, 1))


@recorded
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_preferred_tiles_keep_to_their_allowance(arch: str) -> None:
    for tile, used in report.report(arch, "glu bf16", preferred_only=True):
        assert not report.complaints(arch, "glu bf16", tile, used)
        assert used.shared <= SHARED_MEMORY[arch]
        # a rotation goes through shared memory alone: shuffles would be a gather that Triton split otherwise
        assert used.loop["SHFL"] <= 4


@recorded
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", report.CONFIGURATIONS)
def test_every_tile_keeps_to_its_allowance(arch: str, name: str) -> None:
    for tile, used in report.report(arch, name):
        assert not report.complaints(arch, name, tile, used)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_100", "gfx942"])
def test_other_architectures_compile(arch: str) -> None:
    with virtual_gpu(arch) as gpu:
        report.call()
        assert gpu.launches == ALL


def test_complaints_are_made() -> None:
    tile, used = next(report.report("sm_90", "glu bf16", preferred_only=True))
    assert report.complaints("sm_90", "glu bf16", tile, used._replace(stack=10**6))
    used.loop.clear()
    assert report.complaints("sm_90", "glu bf16", tile, used)


def test_two_lengths_compile_once() -> None:
    with virtual_gpu("sm_90") as gpu:
        for length in (1, 17, 48, 1000):
            report.call(length, width=16, values=16, chosen=SMALL)
        assert gpu.launches == ALL * 4
        assert len(gpu.compiled()) == len(ALL)


def test_every_option_compiles() -> None:
    """One head, masks and packing, switches off: what the interpreter cannot tell, the compiler does."""
    q, v = torch.zeros(1, 20, 2, 12), torch.zeros(1, 20, 1, 20)
    bare, scale = launch.Mix(None, None, None, None, True), launch.Mix(torch.zeros(2, 9), None, None, None, False)
    mask, bounds = torch.ones(1, 20, dtype=torch.bool), torch.tensor([0, 7, 20])
    common = {"norm": True, "eps": 1e-12, "max_lag": 9, "chosen": SMALL}
    with virtual_gpu("sm_90") as gpu:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x, y = q.to(dtype), v.to(dtype)
            launch.forward(
                x,
                x,
                y,
                scale,
                bare,
                glu=True,
                causal=True,
                by_lag=True,
                attention_mask=mask,
                cu_seqlens=bounds,
                **common,
            )
        low_rank = launch.Mix(None, torch.zeros(1, 20, 1), torch.zeros(1, 20, 1), torch.zeros(1, 20, 1, 1), False)
        common |= {"norm": False, "max_lag": 20}
        launch.forward(q[:, :, :1], q[:, :, :1], v, low_rank, low_rank, glu=False, causal=False, by_lag=False, **common)
        assert gpu.launches == ALL[1:] * 3 + ALL


def test_a_tile_too_large_gives_way_to_a_smaller_one() -> None:
    """tf32 at a score width of 128 does not fit sm_86's shared memory: the launch goes on down the table."""
    with virtual_gpu("sm_86") as gpu:
        report.call(dtype=torch.float32, allow_tf32=True, width=128)
        assert gpu.launches == ALL
        *_, too_large, fitting = (compiled.metadata.shared for compiled in gpu.compiled())
    assert fitting <= SHARED_MEMORY["sm_86"] < too_large


@pytest.mark.parametrize("value_width", [1, 16, 96, 1024])
def test_tiles_are_what_the_kernels_can_take(value_width: int) -> None:
    for kernel in KERNELS:
        for precision, family in itertools.product(("bf16", "fp16", "tf32", "ieee"), ("ampere", "hopper")):
            found = tiles(kernel, precision, value_width, family)
            assert len(set(found)) == len(found)
            for tile in found:
                assert tile.rows % tile.keys == 0
                assert all(size >= 16 and size & (size - 1) == 0 for size in tile[:2])
                assert (kernel == "readout") == (tile.values >= 16)
