"""Loads, stores, asynchronous copies to shared memory, and exchanges inside a warp."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from emulator.machine import WARP, Block, instruction
from emulator.memory import Memory
from emulator.program import Address, Constant, Group, Instruction
from emulator.values import U32, U64, Array, bits_of, float32_pattern, integer, pattern

_REDUCTIONS: dict[str, np.ufunc] = {
    "add": np.add, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


@instruction("ld")
def _(block: Block, step: Instruction) -> None:
    if step.modifiers[0] == "param":
        _load_parameter(block, step)
        return
    target, source = step.operands
    parts = target.items if isinstance(target, Group) else (target,)
    size = bits_of(step.kind) // 8
    addresses, nbytes = block.address(source), size * len(parts)
    raw = np.zeros((block.threads, nbytes), np.uint8)
    raw[block.mask] = _checked(block, step, addresses, nbytes).read(addresses[block.mask], nbytes)
    if step.modifiers[0] == "shared":
        block.shared.note_load(addresses[block.mask], nbytes, block.warp[block.mask])
        block.shared.count_wavefronts("load", addresses, nbytes, block.mask)
    for index, part in enumerate(parts):
        block.write(part, _number(raw[:, index * size : (index + 1) * size]))


@instruction("st")
def _(block: Block, step: Instruction) -> None:
    target, source = step.operands
    parts = source.items if isinstance(source, Group) else (source,)
    size = bits_of(step.kind) // 8
    addresses, nbytes = block.address(target), size * len(parts)
    memory, mask = _checked(block, step, addresses, nbytes), block.mask
    raw = np.concatenate([_bytes(block.read(part, step.kind), size) for part in parts], 1)
    if step.modifiers[0] == "shared":
        block.shared.store(addresses[mask], raw[mask], block.warp[mask])
        block.shared.count_wavefronts("store", addresses, nbytes, mask)
    else:
        memory.write(addresses[mask], raw[mask])


def _checked(block: Block, step: Instruction, addresses: NDArray[np.int64], nbytes: int) -> Memory:
    if step.modifiers[0] not in ("global", "shared"):
        raise NotImplementedError(f"the emulator does not know {step.text!r}")
    memory: Memory = block.memory if step.modifiers[0] == "global" else block.shared
    memory.check(addresses[block.mask], nbytes, step.text)
    return memory


def _load_parameter(block: Block, step: Instruction) -> None:
    target, source = step.operands
    assert isinstance(source, Address)
    assert isinstance(source.base, str)
    value = block.arguments[source.base]
    if isinstance(value, float):
        found: Array = float32_pattern(np.full(block.threads, value))
    else:
        found = pattern(np.full(block.threads, value, np.int64), step.kind)
    block.write(target, found)


def _number(raw: NDArray[np.uint8]) -> Array:
    size = raw.shape[1]
    value = np.ascontiguousarray(raw).view(f"<u{size}")[:, 0]
    return value.astype(U64 if size == 8 else U32)


def _bytes(value: Array, size: int) -> NDArray[np.uint8]:
    return np.ascontiguousarray(value.astype(f"<u{size}")).view(np.uint8).reshape(-1, size)


@instruction("cp")
def _(block: Block, step: Instruction) -> None:
    if step.modifiers[0] != "async" or step.modifiers[1] == "bulk":
        raise NotImplementedError(f"the emulator does not know {step.text!r}")
    if step.modifiers[1] == "commit_group":
        block.groups.append(block.issued)
        block.issued = []
    elif step.modifiers[1] in ("wait_group", "wait_all"):
        pending = 0
        if step.operands:
            assert isinstance(step.operands[0], Constant)
            pending = step.operands[0].bits
        while len(block.groups) > pending:
            for deliver in block.groups.popleft():
                deliver()
    else:
        _copy(block, step)


def _copy(block: Block, step: Instruction) -> None:
    """The bytes arrive when the copy is waited for: whoever reads them earlier reads what was there before."""
    target, source, count, *given = step.operands
    assert isinstance(count, Constant)
    nbytes, mask = count.bits, block.mask
    to, start = block.address(target)[mask], block.address(source)
    taken = block.read(given[0], "u32").astype(np.int64) if given else np.full(block.threads, nbytes)
    whole, some = mask & (taken == nbytes), mask & (taken > 0) & (taken < nbytes)
    raw = np.zeros((block.threads, nbytes), np.uint8)
    block.memory.check(start[whole], nbytes, step.text)
    raw[whole] = block.memory.read(start[whole], nbytes)
    for thread in np.flatnonzero(some):
        raw[thread, : taken[thread]] = block.memory.read(start[thread : thread + 1], int(taken[thread]))[0]
    block.shared.check(to, nbytes, step.text)
    warps, raw = block.warp[mask], raw[mask]
    # it may be written from now on until it is waited for
    block.shared.note_store(to, nbytes, warps, fenced=True)

    def deliver() -> None:
        block.shared.note_store(to, nbytes, warps, fenced=True)
        block.shared.write(to, raw)

    block.issued.append(deliver)


@instruction("ldmatrix", "stmatrix")
def _(block: Block, step: Instruction) -> None:
    """Matrices of 8 x 8 halves, whose rows of 16 bytes the lanes name, eight for each matrix."""
    load, transposed = step.name == "ldmatrix", "trans" in step.modifiers
    group, place = step.operands if load else step.operands[::-1]
    assert isinstance(group, Group)
    rows = block.address(place)
    first_lane = block.thread - block.lane
    naming = block.lane < 8 * len(group.items)
    block.shared.check(rows[naming], 16, step.text)
    note = block.shared.note_load if load else block.shared.note_store
    note(rows[naming], 16, block.warp[naming])
    for start in range(0, block.threads, WARP):
        ours = slice(start, start + WARP)
        block.shared.count_wavefronts("matrix " + ("load" if load else "store"), rows[ours], 16, naming[ours])
    for index, part in enumerate(group.items):
        # element (row, column) of a matrix: two neighbours of a row to a lane, or of a column
        a, b = block.lane // 4, 2 * (block.lane % 4)
        value = np.zeros(block.threads, U32) if load else block.read(part, "b32").astype(U32)
        for which in range(2):
            row, column = (b + which, a) if transposed else (a, b + which)
            addresses = rows[first_lane + 8 * index + row] + 2 * column
            if load:
                value |= _number(block.shared.read(addresses, 2)).astype(U32) << U32(16 * which)
            else:
                block.shared.write(addresses, _bytes((value >> U32(16 * which)) & U32(0xFFFF), 2))
        if load:
            block.write(part, value)


@instruction("redux")
def _(block: Block, step: Instruction) -> None:
    target, source, members = step.operands
    _, combine, kind = step.modifiers
    if kind not in ("s32", "u32", "b32") or not (block.read(members, "b32") == U32(0xFFFFFFFF)).all():
        raise NotImplementedError(f"a reduction of floats, or of part of a warp: {step.text!r}")
    value = integer(block.read(source, kind), kind).reshape(-1, WARP)
    block.write(target, pattern(_REDUCTIONS[combine].reduce(value, 1).repeat(WARP), kind))


@instruction("shfl")
def _(block: Block, step: Instruction) -> None:
    target, source, by, *_ = step.operands
    offset = block.read(by, "b32").astype(np.int64)
    lanes = {"bfly": block.lane ^ offset, "idx": offset & (WARP - 1), "up": block.lane - offset,
             "down": block.lane + offset}[step.modifiers[1]]  # fmt: skip
    # out of the warp: its own value
    lanes = np.where((lanes < 0) | (lanes >= WARP), block.lane, lanes)
    value = block.read(source, "b32")
    block.write(target, value[block.thread - block.lane + lanes])
    block.found["shuffles"] += block.threads // WARP
