"""The kernels compiled ahead of time, through their real launch code, for architectures that are not here."""

import itertools
from collections import defaultdict

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed on this platform")

import report_backward
import report_decode
import report_forward
import report_short_conv
import triton
from virtual_gpu import KERNELS as ALL_KERNELS
from virtual_gpu import SHARED_MEMORY, virtual_gpu

from hypermlp_kernels import launch
from hypermlp_kernels.arguments import Options, SequenceMix
from hypermlp_kernels.backward_tiles import BackwardTile
from hypermlp_kernels.tiles import KERNELS, Design, Precision, Tile, tiles
from tests.quick import some

pytestmark = pytest.mark.skipif(launch.interpreted(), reason="TRITON_INTERPRET is set: nothing is compiled")
STATISTICS = ["routing_statistic_kernel", "selection_statistics_kernel", "extreme_norms_kernel"]
ALL, STORED = [*STATISTICS, "readout_kernel"], [*STATISTICS, "stored_readout_kernel"]
recorded = pytest.mark.skipif(
    not triton.__version__.startswith("3.7."), reason="the allowances are recorded for the code Triton 3.7 makes"
)
SMALL = dict.fromkeys(KERNELS, Tile(16, 16, 16, 1, 1))


@recorded
@pytest.mark.parametrize("design", report_forward.DESIGNS)
@pytest.mark.parametrize("arch", some(["sm_80", "sm_90"], quick=["sm_90"]))
def test_preferred_tiles_keep_to_their_allowance(arch: str, design: Design) -> None:
    for tile, used in report_forward.report(arch, "glu bf16", preferred_only=True, design=design):
        assert not report_forward.complaints(arch, "glu bf16", tile, used)
        assert used.shared <= SHARED_MEMORY[arch]
        # a rotation goes through shared memory alone: shuffles would be a gather that Triton split otherwise
        assert used.loop["SHFL"] <= 4


@recorded
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", report_forward.CONFIGURATIONS)
@pytest.mark.parametrize("design", report_forward.DESIGNS)
def test_every_tile_keeps_to_its_allowance(arch: str, name: str, design: Design) -> None:
    preferred = {found[0] for found in report_forward.tile_table(arch, name, design).values()}
    for tile, used in report_forward.report(arch, name, design=design):
        assert not report_forward.complaints(arch, name, tile, used)
        assert tile not in preferred or used.shared <= SHARED_MEMORY[arch]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32", "ieee"])
def test_the_last_tiles_fit_every_gpu(precision: Precision) -> None:
    """At widths beyond what anyone is likely to take, where the preferred tiles do not fit."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    for design, kernels in report_forward.DESIGNS.items():
        last = {kernel: tiles(kernel, precision, 1024, "ampere")[-1] for kernel in kernels}
        assert last == {kernel: tiles(kernel, precision, 1024, "hopper")[-1] for kernel in kernels}
        with virtual_gpu("sm_86") as gpu:
            report_forward.call(
                dtype=dtype, allow_tf32=precision == "tf32", width=128, values=1024, rank=32, chosen=last, design=design
            )
            assert len(gpu.compiled()) == len(kernels) + 1  # norms of any size
            for compiled in gpu.compiled():
                assert compiled.metadata.shared <= min(SHARED_MEMORY[arch] for arch in ("sm_86", "sm_80", "sm_90"))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_100", "gfx942"])
def test_other_architectures_compile(arch: str) -> None:
    """And use their tensor cores, as far as the machine code tells."""
    rows = list(report_forward.rows(arch, "glu bf16", True))
    assert [f"{row.kernel}_kernel" for row in rows[:3]] == [*STATISTICS[:2], "readout_kernel"]
    for row in rows:
        assert row.used.tensor_instructions
        assert row.used.registers
        assert not row.complaints


def test_complaints_are_made() -> None:
    tile, used = next(report_forward.report("sm_90", "glu bf16", preferred_only=True))
    assert report_forward.complaints("sm_90", "glu bf16", tile, used._replace(stack=10**6))
    used.loop.clear()
    assert report_forward.complaints("sm_90", "glu bf16", tile, used)


@pytest.mark.parametrize("width", [16, 12])
def test_two_lengths_compile_once(width: int) -> None:
    """Whether numbers that go with the length are 1 or multiples of 16 makes no other kernel."""
    with virtual_gpu("sm_90") as gpu:
        for length in (1, 17, 48, 1000):
            report_forward.call(length, width=width, values=width, rank=width, chosen=SMALL)
        assert gpu.launches == ALL * 4
        assert len(gpu.compiled()) == len(ALL)
        # nor is anything loaded, which Triton 3.9 would unload in the end
        assert [compiled.module for compiled in gpu.compiled()] == [None] * len(ALL)


@pytest.mark.parametrize("width", [16, 12])
def test_two_lengths_and_chunks_compile_the_stored_map_once(width: int) -> None:
    with virtual_gpu("sm_90") as gpu:
        # chunks of one slot of the longest rows, whose count and first slot take all kinds of values
        for length in (1, 17, 48, 320):
            limit = 16 * 2 * 16 * triton.cdiv(length, 16)
            report_forward.call(
                length, width=width, values=width, rank=width, chosen=SMALL, design="store", scratch_limit=limit
            )
        assert set(gpu.launches) == set(STORED)
        assert gpu.launches.count("stored_readout_kernel") > 4 * 2
        assert len(gpu.compiled()) == len(STORED)


def test_the_model_chooses() -> None:
    with virtual_gpu("sm_90") as gpu:
        report_forward.call(design=None, values=512, chosen=SMALL)
        report_forward.call(design=None, values=16, width=16, chosen=SMALL)
        assert gpu.launches == STORED + ALL
        report_forward.call(design=None, values=512, chosen=SMALL, scratch_limit=0)
        assert gpu.launches[-len(ALL) :] == ALL
    with virtual_gpu("sm_90"), pytest.raises(ValueError, match="scratch_limit=0 bytes does not hold 16 rows of 64"):
        report_forward.call(design="store", chosen=SMALL, scratch_limit=0)


def test_every_option_compiles() -> None:
    """One head, masks and packing, switches off: what the interpreter cannot tell, the compiler does."""
    q, v = torch.zeros(1, 20, 2, 12), torch.zeros(1, 20, 1, 20)
    bare, scale = SequenceMix(None, None, None, None, True), SequenceMix(torch.zeros(2, 9), None, None, None, False)
    mask, bounds = torch.ones(1, 20, dtype=torch.bool), torch.tensor([0, 7, 20])
    by_lag, by_position = (
        Options("glu", True, 1e-12, True, "lag", 9),
        Options("relu", False, 1e-12, False, "position", 20),
    )
    with virtual_gpu("sm_90") as gpu:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x, y = q.to(dtype), v.to(dtype)
            for design in report_forward.DESIGNS:
                launch.forward(
                    x, x, y, scale, bare, by_lag, attention_mask=mask, cu_seqlens=bounds, chosen=SMALL, design=design
                )  # fmt: skip
        low_rank = SequenceMix(None, torch.zeros(1, 20, 1), torch.zeros(1, 20, 1), torch.zeros(1, 20, 1, 1), False)
        for design in report_forward.DESIGNS:
            launch.forward(
                q[:, :, :1], q[:, :, :1], v, low_rank, low_rank, by_position, chosen=SMALL, design=design
            )  # fmt: skip
        without_norm = [name for name in ALL + STORED if name != "extreme_norms_kernel"]
        assert gpu.launches == (ALL[1:] + STORED[1:]) * 3 + without_norm


def test_every_launch_asks_for_fused_products_and_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Triton does where nothing is said is to change: its 3.9 warns of it."""
    asked: dict[str, set[object]] = defaultdict(set)

    def launch_nothing(kernel: triton.JITFunction, *args: object, **options: object) -> None:
        asked[kernel.fn.__name__].add(options.get("enable_fp_fusion"))

    monkeypatch.setattr(triton.JITFunction, "run", launch_nothing)
    with virtual_gpu("sm_90"):
        for design in report_forward.DESIGNS:
            report_forward.call(width=16, values=16, chosen=SMALL, design=design)
        report_backward.call(32, width=16, values=16, tile=BackwardTile(16, 16, 16, 16, 16, 1, 1), span=1)
        report_decode.Step(width=16, values=16).run()
        report_short_conv.call(channels=16)
    assert asked == {kernel.fn.__name__: {True} for kernel in ALL_KERNELS}


def test_a_tile_too_large_gives_way_to_a_smaller_one() -> None:
    """tf32 at a score width of 128 does not fit sm_86's shared memory: the launch goes on down the table."""
    with virtual_gpu("sm_86") as gpu:
        report_forward.call(dtype=torch.float32, allow_tf32=True, width=128)
        assert gpu.launches == ALL
        *_, too_large, fitting, _ = (compiled.metadata.shared for compiled in gpu.compiled())
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
                assert (kernel in ("readout", "stored_readout")) == (tile.values >= 16)


def test_the_report_names_a_tile_that_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    """On an architecture nobody chose tiles for; a launch takes the next one there."""
    found = [used.name for _, used in report_forward.report("gfx942", "glu fp16", preferred_only=True, design="store")]
    assert found == ["storing_selection_statistics_kernel", "stored_readout_kernel"]
    assert "stored_readout 64x64x256: out of resource" in capsys.readouterr().err
