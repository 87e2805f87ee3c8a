"""The decoding kernels compiled ahead of time, through their real launch code, for architectures that are not here."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed on this platform")

import report_decode
import report_table
import triton
from report_decode import Step
from virtual_gpu import SHARED_MEMORY, virtual_gpu

from hypermlp_kernels import launch, launch_decode
from hypermlp_kernels.arguments import Options, SequenceMix
from tests.quick import some

pytestmark = pytest.mark.skipif(launch.interpreted(), reason="TRITON_INTERPRET is set: nothing is compiled")
recorded = pytest.mark.skipif(
    not triton.__version__.startswith("3.7."), reason="the allowances are recorded for the code Triton 3.7 makes"
)
ALL = [f"decode_{phase}_kernel" for phase in ("scores", "selection", "readout", "sum")]


@recorded
@pytest.mark.parametrize("arch", some(["sm_80", "sm_90"], quick=["sm_90"]))
@pytest.mark.parametrize(
    "name",
    [
        name if name == "decode glu bf16" else pytest.param(name, marks=pytest.mark.slow)
        for name in report_decode.CONFIGURATIONS
    ],
)
def test_kernels_keep_to_their_allowance(arch: str, name: str) -> None:
    for used in report_decode.report(arch, name):
        assert not report_table.spills_of(arch, name, used, report_table.ALLOWED_STACK)
        assert used.shared <= SHARED_MEMORY[arch]


def test_complaints_are_made() -> None:
    used = next(iter(report_decode.report("sm_90", "decode glu bf16")))
    assert report_table.spills_of("sm_90", "decode glu bf16", used._replace(stack=10**6), {})


@pytest.mark.parametrize("slots_last", [False, True])
def test_any_length_compiles_once(slots_last: bool) -> None:
    """Whatever the number of tokens, where the ring's oldest lies, and where its mask begins."""
    common = {"slots_last": slots_last, "width": 16, "values": 16, "rank": 4}
    with virtual_gpu("sm_90") as gpu:
        for older, newer, capacity in ((1, 0, 64), (17, 0, 64), (48, 1, 64), (1, 15, 64), (500, 499, 1024)):
            Step(older, newer, capacity, **common).run()
        assert gpu.launches == ALL * 5
        assert len(gpu.compiled()) == len(ALL)
        before = gpu.compiled()
        for older, newer in ((1, 0), (33, 0), (31, 2)):
            Step(older, newer, 64, masked=True, batch=3, **common).run()
        masked = len(gpu.compiled())
        assert masked == 2 * len(ALL) - 1  # the sum knows no mask
        Step(40, 3, 64, masked=True, batch=2, **common).run()
        assert len(gpu.compiled()) == masked
        assert before[0] is gpu.compiled()[0]


def test_the_length_on_the_device_is_not_read() -> None:
    """Neither the grid nor what is compiled depends on it: a tensor that nobody could read will do."""
    with virtual_gpu("sm_90") as gpu, pytest.MonkeyPatch.context() as patch:
        unreadable = torch.zeros((), dtype=torch.long)
        patch.setattr(report_decode.torch, "tensor", lambda _: unreadable)
        for method in ("__int__", "__index__", "__bool__", "__float__", "item", "tolist"):
            patch.setattr(torch.Tensor, method, _refuse)
        Step(7, static=True, width=16, values=16).run()
        assert gpu.launches == ALL


def _refuse(self: torch.Tensor, *args: object) -> None:
    raise AssertionError("the host read a tensor")


@pytest.mark.parametrize("slots_last", [False, True])
def test_keys_and_values_are_loaded_in_vectors(slots_last: bool) -> None:
    """Also where a ring's oldest slot lies at an odd address."""
    with virtual_gpu("sm_90") as gpu:
        Step(older=501, newer=400, slots_last=slots_last).run()
        scores, _, readout, _ = (compiled.asm["ptx"] for compiled in gpu.compiled())
    # a thread's share of a tile in 16-byte loads: two maps of 64 x 64, one of 64 x 128 or 32 x 256
    assert scores.count("ld.global.v4.b32") >= 2 * 64 * 64 * 2 // 16 // 128
    assert readout.count("ld.global.v4.b32") >= 8192 * 2 // 16 // 128


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow), torch.float16])
def test_every_option_compiles(dtype: torch.dtype) -> None:
    with virtual_gpu("sm_90") as gpu:
        Step(20, 3, 64, glu=False, dtype=dtype, position=True, masked=True, heads=1, width=12, values=20, rank=5).run()
        Step(20, 0, 64, dtype=dtype, static=True, heads=3, width=5, values=33, rank=1, slots_last=True).run()
        bare = SequenceMix(None, None, None, None, True)
        q, v = torch.zeros(1, 1, 2, 8, dtype=dtype), torch.zeros(1, 1, 9, 8, dtype=dtype)
        options = Options("glu", False, 1e-12, True, "lag", None)
        launch_decode.decode(q, [q.expand(1, 9, 2, 8).transpose(1, 2)], [v], bare, bare, options)
        assert gpu.launches == ALL * 3


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_100", "gfx942"])
def test_other_architectures_compile(arch: str) -> None:
    with virtual_gpu(arch) as gpu:
        Step().run()
        Step(slots_last=True, static=True).run()
        assert gpu.launches == ALL * 2


@pytest.mark.parametrize(
    ("rows", "slots", "processors"), [(1, 1, 132), (2, 32768, 132), (64, 4096, 108), (999, 70, 132)]
)
def test_splits_fill_the_device(rows: int, slots: int, processors: int) -> None:
    count = launch_decode.splits(rows, slots, processors)
    assert 1 <= count <= max(1, -(-slots // 64))
    assert count * rows >= min(2 * processors, -(-slots // 64) * rows)
