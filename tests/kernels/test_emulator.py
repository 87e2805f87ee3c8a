"""The PTX emulator: compiled kernels give what float64 gives, and what a GPU would punish is found."""

from collections import Counter

import numpy as np
import pytest

pytest.importorskip("triton", reason="triton is not installed on this platform")

import emulate
from emulator import device
from emulator.machine import launch as launch_program
from emulator.memory import FaultError, GlobalMemory
from emulator.program import Instruction, Program, parse

from hypermlp_kernels import launch
from hypermlp_kernels.tiles import Tile

pytestmark = pytest.mark.skipif(launch.interpreted(), reason="TRITON_INTERPRET is set: nothing is compiled")
HEAD = ".visible .entry k(\n .param .u64 .ptr .global .align 1 k_param_0,\n .param .u32 k_param_1\n)\n{\n"
LOAD = "ld.param.b64 %rd1, [k_param_0]; mov.u32 %r1, %tid.x; mul.wide.u32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2;\n"
SHARED = "shl.b32 %r2, %r1, 2; add.s32 %r3, %r2, 0;\n"


def run(code: str, data: np.ndarray, threads: int = 64, number: int = 0) -> tuple[np.ndarray, Counter]:
    """A kernel of ``code`` over one array, and what was found."""
    memory, found = GlobalMemory(), Counter()
    address = memory.allocate(data.view(np.uint8))
    launch_program(parse(f"{HEAD}{LOAD}{code}\nret;\n}}"), memory, (1, 1, 1), threads, 4096, [address, number], found)
    return memory.data[address : address + data.nbytes].view(data.dtype), found


def exchange(between: str) -> Counter:
    """Every thread leaves a number in shared memory and takes its neighbour's, in the other warp."""
    code = (
        f"{SHARED} st.shared.b32 [%r3], %r1; {between}\n"
        "xor.b32 %r4, %r2, 128; ld.shared.b32 %r5, [%r4]; st.global.b32 [%rd3], %r5;"
    )
    result, found = run(code, np.zeros(64, np.uint32))
    assert (result == np.arange(64) ^ 32).all()
    return found


def test_a_missing_barrier_is_a_race() -> None:
    assert exchange("bar.sync 0;")["races"] == 0
    assert exchange("")["races"] == 64


def test_reading_before_a_store_of_another_warp_is_a_race() -> None:
    load = f"{SHARED} xor.b32 %r4, %r2, 128; ld.shared.b32 %r5, [%r4];"
    assert run(f"{load} bar.sync 0; st.shared.b32 [%r3], %r1;", np.zeros(64, np.uint32))[1]["races"] == 0
    assert run(f"{load} st.shared.b32 [%r3], %r1;", np.zeros(64, np.uint32))[1]["races"] == 64


def test_shared_memory_of_the_block_by_its_longer_name() -> None:
    """``shared`` and ``shared::cta`` are one memory, watched in the same way; another block's is refused."""
    short = exchange("")
    code = f"{SHARED} st.shared::cta.b32 [%r3], %r1; xor.b32 %r4, %r2, 128; ld.shared::cta.b32 %r5, [%r4];"
    result, found = run(f"{code} st.global.b32 [%rd3], %r5;", np.zeros(64, np.uint32))
    assert (result == np.arange(64) ^ 32).all()
    assert found == short
    with pytest.raises(NotImplementedError, match="shared::cluster"):
        run(code.replace("::cta", "::cluster"), np.zeros(64, np.uint32))


@pytest.mark.parametrize("named", ["shared", "shared::cta"])
def test_copies_and_matrices_to_the_block_s_own_memory(named: str) -> None:
    """``cp.async`` and ``ldmatrix``, under both names: a lane's part of the matrix that another lane copied."""
    code = (
        f"shl.b32 %r2, %r1, 4; mul.wide.u32 %rd4, %r1, 16; add.s64 %rd5, %rd1, %rd4;\n"
        f"cp.async.cg.{named}.global [%r2], [%rd5], 16; cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;\n"
        f"ldmatrix.sync.aligned.m8n8.x1.{named}.b16 {{%r5}}, [%r2]; st.global.b32 [%rd3], %r5;"
    )
    numbers = np.arange(32 * 4, dtype=np.uint32)
    result, found = run(code, numbers.copy(), threads=32)
    # row by row of 8 halves: four words to a row, one to a lane
    assert (result[:32] == numbers[:32]).all()
    assert found["matrix load passes"]
    assert found["races"] == found["copies nobody waited for"] == 0


def test_two_values_in_one_place_are_a_race() -> None:
    assert run("mov.b32 %r2, 0; st.shared.b32 [%r2], %r1;", np.zeros(64, np.uint32))[1]["races"] > 0
    assert run("mov.b32 %r2, 0; st.shared.b32 [%r2], 5;", np.zeros(64, np.uint32))[1]["races"] == 0
    _, found = run("mov.b32 %r2, 0; st.shared.b32 [%r2], %r1;", np.zeros(64, np.uint32), threads=32)
    assert (found["races"], found["copies that differ in a warp"]) == (0, 31)


@pytest.mark.parametrize(("stride", "conflicts"), [(4, 0), (8, 1), (128, 31)])
def test_bank_conflicts(stride: int, conflicts: int) -> None:
    _, found = run(f"mul.lo.s32 %r2, %r1, {stride}; st.shared.b32 [%r2], %r1;", np.zeros(32, np.uint32), threads=32)
    assert found["store conflicts"] == conflicts
    assert found["store passes"] == 1 + conflicts


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("st.global.b32 [%rd3+4], %r1;", "outside of any allocation"),
        ("ld.global.b32 %r2, [%rd1+-4];", "outside of any allocation"),
        ("shl.b32 %r2, %r1, 2; st.shared.b32 [%r2+8192], %r1;", "outside of any allocation"),
        ("ld.global.b32 %r2, [%rd1+2];", "misaligned"),
        ("ld.global.v2.b32 {%r2, %r3}, [%rd3];", "misaligned"),
    ],
)
def test_faults(code: str, message: str) -> None:
    with pytest.raises(FaultError, match=message):
        run(code, np.zeros(64, np.uint32))


def test_a_guarded_access_touches_nothing() -> None:
    code = "setp.lt.u32 %p1, %r1, 3; @%p1 st.global.b32 [%rd3], 7; @!%p1 st.global.b32 [%rd3+65536], 7;"
    with pytest.raises(FaultError):
        run(code, np.zeros(64, np.uint32))
    result, _ = run(code.split("@!")[0], np.zeros(64, np.uint32))
    assert result.tolist() == [7] * 3 + [0] * 61


@pytest.mark.parametrize(("wait", "expected"), [("cp.async.wait_group 0;", 1), ("cp.async.wait_group 1;", 0), ("", 0)])
def test_a_copy_arrives_when_it_is_waited_for(wait: str, expected: int) -> None:
    code = f"{SHARED} cp.async.ca.shared.global [%r3], [%rd3], 4; cp.async.commit_group; {wait}"
    result, found = run(f"{code} ld.shared.b32 %r5, [%r3]; st.global.b32 [%rd3], %r5;", np.ones(64, np.uint32))
    assert (result == expected).all()
    assert found["copies nobody waited for"] == 1 - expected


def test_loops_and_arithmetic() -> None:
    """The sum of i^2 for i below the thread's number, in int32 and then in float32."""
    code = (
        "ld.param.b32 %r9, [k_param_1]; mov.b32 %r2, 0; mov.b32 %r3, 0;\n"
        "$L1: setp.lt.s32 %p1, %r2, %r1; mul.lo.s32 %r4, %r2, %r2; @%p1 add.s32 %r3, %r3, %r4;\n"
        "add.s32 %r2, %r2, 1; setp.lt.s32 %p2, %r2, %r9; @%p2 bra $L1;\n"
        "cvt.rn.f32.s32 %r5, %r3; mul.f32 %r6, %r5, 0f3F000000; st.global.b32 [%rd3], %r6;"
    )
    result, _ = run(code, np.zeros(64, np.float32), number=64)
    assert result.tolist() == [sum(i * i for i in range(n)) / 2 for n in range(64)]


@pytest.mark.parametrize("operation", ["add.s32", "min.s32", "max.s32", "max.u32", "and.b32", "xor.b32"])
def test_a_warp_s_own_reduction(operation: str) -> None:
    """Of 32 lanes each, signed and not."""
    numbers = (np.arange(64) * 2654435761 % 2**32).astype(np.uint32)
    code = f"ld.global.b32 %r2, [%rd3]; redux.sync.{operation} %r3, %r2, -1; st.global.b32 [%rd3], %r3;"
    result, _ = run(code, numbers.copy())
    name, kind = operation.split(".")
    reduce = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "xor": np.bitwise_xor}[
        name
    ].reduce
    expected = reduce(numbers.view(np.int32 if kind == "s32" else np.uint32).reshape(2, 32), 1).astype(np.int32)
    assert (result.view(np.int32) == expected.repeat(32)).all()
    with pytest.raises(NotImplementedError, match="part of a warp"):
        run(code.replace("-1", "15"), numbers.copy())


def test_integers_wrap_and_divide_as_on_a_gpu() -> None:
    code = (
        "sub.s32 %r2, %r1, 5; div.s32 %r3, %r2, 2; rem.s32 %r4, %r2, 2; shr.s32 %r5, %r2, 1; bfe.s32 %r6, %r1, 0, 2;\n"
        "mul.lo.s32 %r7, %r3, 1000; mad.lo.s32 %r7, %r4, 100, %r7; mad.lo.s32 %r7, %r5, 10, %r7;\n"
        "add.s32 %r7, %r7, %r6; st.global.b32 [%rd3], %r7;"
    )
    result, _ = run(code, np.zeros(8, np.int32), threads=8)
    # toward zero, toward zero, downward, sign of the upper bit
    signed = [0, 1, -2, -1] * 2
    expected = [
        int((n - 5) / 2) * 1000 + (n - 5 - 2 * int((n - 5) / 2)) * 100 + ((n - 5) >> 1) * 10 + signed[n]
        for n in range(8)
    ]
    assert result.tolist() == expected


def test_threads_that_part_and_unknown_instructions_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="threads of a block part"):
        run("setp.lt.u32 %p1, %r1, 3; @%p1 bra $L1; $L1: mov.b32 %r2, 0;", np.zeros(64, np.uint32))
    with pytest.raises(NotImplementedError, match=r"atom\.global"):
        run("atom.global.add.u32 %r2, [%rd3], 1;", np.zeros(64, np.uint32))


def test_a_compiled_forward() -> None:
    result = emulate.emulate("sm_80", Tile(32, 16, 16, 2, 2), length=20, width=16, values=16, rank=4)
    assert not result.wrong, result
    assert [one.name for one in result.launches] == [
        "routing_statistic_kernel", "selection_statistics_kernel", "extreme_norms_kernel", "readout_kernel",
    ]  # fmt: skip
    # of rows of ordinary size the norms are read and left alone
    assert all(bool(one.found["mma"]) == (one.name != "extreme_norms_kernel") for one in result.launches)


def test_a_compiled_backward() -> None:
    result = emulate.emulate("sm_80", Tile(32, 16, 16, 2, 2), length=20, width=16, values=16, rank=4, backward=True)
    assert not result.wrong, result
    assert {one.name for one in result.launches[4:]} == {
        "weight_gradient_kernel", "readout_statistic_gradient_kernel", "map_gradient_kernel", "table_gradient_kernel",
        "turn_kernel", "key_product_kernel",
    }  # fmt: skip
    assert all(one.found["mma"] for one in result.launches[4:])


def without(name: str, modifier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on kernels lose these instructions on their way into the emulator."""

    def cut(ptx: str) -> Program:
        whole, nothing = parse(ptx), parse(".entry k() { mov.b32 %none, 0; }").instructions[0]

        def is_cut(one: Instruction) -> bool:
            return one.name == name and modifier in one.modifiers

        return whole._replace(instructions=tuple(nothing if is_cut(one) else one for one in whole.instructions))

    monkeypatch.setattr(device, "parse", cut)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "modifier", "mistake"),
    [
        ("bar", "sync", "races"),
        ("fence", "proxy", "stores not fenced before wgmma"),
        ("cp", "wait_group", "copies nobody waited for"),
    ],
)
def test_a_broken_kernel_is_found(name: str, modifier: str, mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without(name, modifier, monkeypatch)
    result = emulate.emulate("sm_90", Tile(64, 32, 32, 4, 2))
    assert any(one.found[mistake] for one in result.launches)
    assert result.wrong


@pytest.mark.slow
@pytest.mark.parametrize("path", emulate.PATHS)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_every_path(arch: str, path: str) -> None:
    options = emulate.PATHS[path]
    window = None if options.get("layout") == "position" else 60
    result = emulate.emulate(arch, Tile(64, 32, 32, 4, 2), length=70, window=window, backward=True, **options)
    assert not result.wrong, (result.error, result.allowed, [one.mistakes for one in result.launches])
    assert len(result.launches) > 3


@pytest.mark.slow
@pytest.mark.parametrize("path", emulate.PATHS)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_every_path_in_parts(arch: str, path: str) -> None:
    options = emulate.PATHS[path]
    window = None if options.get("layout") == "position" else 60
    result = emulate.emulate(arch, Tile(64, 32, 32, 4, 2), length=100, window=window, backward=True, span=1, **options)
    assert not result.wrong, (result.error, result.allowed, [one.mistakes for one in result.launches])
    assert sum(one.name == "add_parts_kernel" for one in result.launches) == 3


@pytest.mark.slow
@pytest.mark.parametrize("tile", [Tile(64, 64, 64, 4, 2), Tile(128, 32, 128, 8, 2)], ids=str)
def test_larger_tiles_with_padding(tile: Tile) -> None:
    result = emulate.emulate("sm_90", tile, length=150, width=64, values=tile.values, masked=True)
    assert not result.wrong, (result.error, [one.mistakes for one in result.launches])
    assert result.launches[-1].found["wgmma"]


@pytest.mark.slow
def test_the_preferred_backward_tile_with_padding() -> None:
    options = {"length": 200, "width": 64, "values": 64, "masked": True, "window": 150}
    result = emulate.emulate("sm_90", Tile(128, 64, 64, 8, 2), backward=True, **options)
    assert not result.wrong, (result.error, result.allowed, [one.mistakes for one in result.launches])
    # of the kernel for norms of any size nearly every program only reads
    assert [one.name for one in result.launches if not one.found["wgmma"]] == ["extreme_norms_kernel"]
