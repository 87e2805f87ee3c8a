"""Tensor cores: mma of a warp and wgmma of four, with operands of bfloat16, float16 and tf32.

Fragment layouts are those of the PTX manual, section "Matrix multiply-accumulate"; shared-memory operands of
wgmma follow its canonical layouts, with the swizzle that the descriptor names.
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from emulator.machine import WARP, Block, instruction
from emulator.program import Constant, Group, Instruction, Operand
from emulator.values import U32, Array, float32, float32_pattern, half

Matrix = NDArray[np.float64]
_WARPS = 4
# a descriptor's swizzle: bytes of a row, and the mask of address bits 7 to 9 that go into bits 4 to 6
_SWIZZLES = {0: (16, 0), 1: (128, 7), 2: (64, 3), 3: (32, 1)}


def _numbers(value: Array, kind: str) -> list[Matrix]:
    """Of one register: two halves, or one tf32."""
    if kind == "tf32":
        return [float32(value.astype(U32) & U32(0xFFFFE000)).astype(np.float64)]
    return [half(value.astype(U32) >> U32(16 * which), kind).astype(np.float64) for which in range(2)]


def _rows(block: Block, operand: Operand, kind: str) -> Matrix:
    """A fragment of 16 rows: ``[warps, 16, depth]`` with a depth of 16 halves or 8 tf32."""
    assert isinstance(operand, Group)
    per = 1 if kind == "tf32" else 2
    found = np.zeros((block.threads // WARP, 16, 8 * per))
    row, column = block.lane // 4, per * (block.lane % 4)
    for index, part in enumerate(operand.items):
        for which, number in enumerate(_numbers(block.read(part, "b32"), kind)):
            found[block.warp, row + 8 * (index & 1), column + which + 4 * per * (index >> 1)] = number
    return found


def _columns(block: Block, operand: Operand, kind: str) -> Matrix:
    """A fragment of 8 columns: ``[warps, depth, 8]``."""
    assert isinstance(operand, Group)
    per = 1 if kind == "tf32" else 2
    found = np.zeros((block.threads // WARP, 8 * per, 8))
    row, column = per * (block.lane % 4), block.lane // 4
    for index, part in enumerate(operand.items):
        for which, number in enumerate(_numbers(block.read(part, "b32"), kind)):
            found[block.warp, row + which + 4 * per * index, column] = number
    return found


@instruction("mma")
def _(block: Block, step: Instruction) -> None:
    shape, kinds = step.modifiers[2], step.modifiers[-4:]
    kind = kinds[1]
    if kinds != ("f32", kind, kind, "f32") or (shape, kind) not in (
        ("m16n8k16", "bf16"), ("m16n8k16", "f16"), ("m16n8k8", "tf32"),
    ):  # fmt: skip
        raise NotImplementedError(f"the emulator does not know {step.text!r}")
    target, a, b, c = step.operands
    product = _rows(block, a, kind) @ _columns(block, b, kind)
    before = _accumulators(block, c)
    places = ((_row_of(block, n), _column_of(block, n)) for n in range(len(before)))
    _write(block, target, [x + product[block.warp, r, c] for x, (r, c) in zip(before, places, strict=True)])
    block.found["mma"] += block.threads // WARP


def _row_of(block: Block, register: int) -> NDArray[np.int64]:
    return block.lane // 4 + 8 * ((register % 4) >> 1)


def _column_of(block: Block, register: int) -> NDArray[np.int64]:
    return 8 * (register // 4) + 2 * (block.lane % 4) + (register & 1)


def _accumulators(block: Block, operand: Operand) -> list[Matrix]:
    assert isinstance(operand, Group)
    return [float32(block.read(part, "f32")).astype(np.float64) for part in operand.items]


def _write(block: Block, target: Operand, values: list[Matrix]) -> None:
    assert isinstance(target, Group)
    for part, value in zip(target.items, values, strict=True):
        block.write(part, float32_pattern(value))


@instruction("wgmma")
def _(block: Block, step: Instruction) -> None:
    if step.modifiers[0] == "commit_group":
        block.shared.commit_group()
    elif step.modifiers[0] == "wait_group":
        assert isinstance(step.operands[0], Constant)
        block.shared.wait_group(step.operands[0].bits)
    elif step.modifiers[0] == "mma_async":
        _wgmma(block, step)


def _wgmma(block: Block, step: Instruction) -> None:
    shape = re.fullmatch(r"m64n(\d+)k(8|16)", step.modifiers[3])
    kind = step.kind
    if shape is None or kind not in ("bf16", "f16", "tf32"):
        raise NotImplementedError(f"the emulator does not know {step.text!r}")
    columns, depth = int(shape[1]), int(shape[2])
    target, a, b, keep, *signs = step.operands
    flags = [sign.bits for sign in signs if isinstance(sign, Constant)]
    if flags[:2] != [1, 1]:
        raise NotImplementedError(f"a negated operand: {step.text!r}")
    # whether the rows (columns) of an operand, not its depth, are contiguous: of those in shared memory, and not tf32
    major = flags[2:] if kind != "tf32" else [0, 0]
    from_registers = isinstance(a, Group)
    groups = block.threads // (_WARPS * WARP)
    if from_registers:
        left = _rows(block, a, kind).reshape(groups, 64, depth)
    else:
        left = np.stack([_operand(block, a, g, 64, depth, major[0], kind) for g in range(groups)])
    right = np.stack([_operand(block, b, g, columns, depth, major[-1], kind) for g in range(groups)])
    product = left @ right.transpose(0, 2, 1)
    group, warp = block.warp // _WARPS, block.warp % _WARPS
    kept = block.read(keep, "pred").astype(bool)
    # the first of a sum adds to nothing: what the registers hold, if anything, is not read
    assert isinstance(target, Group)
    before: list[Matrix] = [np.zeros(block.threads)] * len(target.items)
    if kept.any():
        before = [np.where(kept, x, 0) for x in _accumulators(block, target)]
    places = ((16 * warp + _row_of(block, n), _column_of(block, n)) for n in range(len(before)))
    _write(block, target, [x + product[group, r, c] for x, (r, c) in zip(before, places, strict=True)])
    block.found["wgmma"] += groups


def _operand(
    block: Block, descriptor: Operand, group: int, rows: int, depth: int, rows_contiguous: int, kind: str
) -> Matrix:
    """``[rows, depth]`` of an operand in shared memory, from the descriptor in a group's first thread."""
    bits = int(block.read(descriptor, "b64")[group * _WARPS * WARP])
    start, leading, stride = ((bits >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    width, mask = _SWIZZLES[bits >> 62 & 3]
    size = 4 if kind == "tf32" else 2
    row, column = np.meshgrid(np.arange(rows), np.arange(depth), indexing="ij")
    if rows_contiguous:
        per = width // size
        offset = (row % per) * size + (row // per) * leading + (column % 8) * width + (column // 8) * stride
    else:
        offset = (row % 8) * width + (row // 8) * stride + column * size
    address = start + offset
    address = (address ^ ((address >> 7 & mask) << 4)).ravel()
    block.shared.check(address, size, "an operand of wgmma")
    block.shared.note_operand(address)
    raw = np.ascontiguousarray(block.shared.read(address, size))
    value = raw.view(f"<u{size}")[:, 0].astype(U32)
    return _numbers(value, kind)[0].reshape(rows, depth)
