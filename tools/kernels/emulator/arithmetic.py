"""Moves, comparisons, integers, floating point and conversions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from emulator.machine import Block, instruction
from emulator.program import Group, Instruction
from emulator.values import (
    U32,
    U64,
    Array,
    bits_of,
    float32,
    float32_pattern,
    half,
    half_pattern,
    integer,
    is_wide,
    pattern,
)

_COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal, "neu": np.not_equal,
}  # fmt: skip
_LOGIC: dict[str, Callable[[Array, Array], Array]] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}
_UNARY: dict[str, Callable[[Array], Array]] = {
    "abs": np.abs, "neg": np.negative, "ex2": np.exp2, "lg2": np.log2, "sqrt": np.sqrt, "rcp": lambda x: 1 / x,
    "rsqrt": lambda x: 1 / np.sqrt(x),
}  # fmt: skip
_BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide,
    # the quiet forms: a number wins over a NaN
    "max": np.fmax, "min": np.fmin,
}  # fmt: skip


@instruction("mov")
def _(block: Block, step: Instruction) -> None:
    target, source = step.operands
    if isinstance(target, Group):
        value = block.read(source, step.kind).astype(U32)
        for shift, part in enumerate(target.items):
            block.write(part, (value >> U32(16 * shift)) & U32(0xFFFF))
    elif isinstance(source, Group):
        low, high = (block.read(part, "b16").astype(U32) & U32(0xFFFF) for part in source.items)
        block.write(target, low | (high << U32(16)))
    elif step.kind == "pred":
        block.write(target, block.read(source, "pred").astype(bool))
    else:
        block.write(target, pattern(block.read(source, step.kind), step.kind))


@instruction("setp")
def _(block: Block, step: Instruction) -> None:
    if len(step.modifiers) != 2:
        raise NotImplementedError(f"a comparison joined to a predicate: {step.text!r}")
    comparison, kind = step.modifiers
    a, b = (block.read(operand, kind) for operand in step.operands[1:])
    a, b = (float32(a), float32(b)) if kind == "f32" else (integer(a, kind), integer(b, kind))
    block.write(step.operands[0], _COMPARISONS[comparison](a, b))


@instruction("selp")
def _(block: Block, step: Instruction) -> None:
    target, yes, no, which = step.operands
    chosen = block.read(which, "pred").astype(bool)
    block.write(target, np.where(chosen, block.read(yes, step.kind), block.read(no, step.kind)))


@instruction("and", "or", "xor")
def _(block: Block, step: Instruction) -> None:
    a, b = (block.read(operand, step.kind) for operand in step.operands[1:])
    block.write(step.operands[0], _LOGIC[step.name](a, b))


@instruction("not")
def _(block: Block, step: Instruction) -> None:
    value = block.read(step.operands[1], step.kind)
    block.write(step.operands[0], ~value if step.kind == "pred" else pattern(~value, step.kind))


@instruction("shl", "shr")
def _(block: Block, step: Instruction) -> None:
    target, source, by = step.operands
    value = integer(block.read(source, step.kind), step.kind)
    most = bits_of(step.kind)
    count = np.minimum(block.read(by, "u32").astype(np.int64), 63)
    shifted = value << count.astype(value.dtype) if step.name == "shl" else value >> count.astype(value.dtype)
    # beyond the width the result is zero, or the sign
    if value.dtype == U64 or step.name == "shl":
        shifted = np.where(count >= most, 0, shifted).astype(value.dtype)
    block.write(target, pattern(shifted, step.kind))


@instruction("bfe")
def _(block: Block, step: Instruction) -> None:
    target, source, start, count = step.operands
    value = integer(block.read(source, "u32"), "u32")
    at, bits = (block.read(operand, "u32").astype(U64) for operand in (start, count))
    field = (value >> at) & ((U64(1) << bits) - U64(1))
    if step.kind == "s32":
        sign = U64(1) << (bits - U64(1))
        field = (field ^ sign) - sign
    block.write(target, pattern(field, step.kind))


@instruction("prmt")
def _(block: Block, step: Instruction) -> None:
    target, low, high, selector = step.operands
    both = block.read(low, "b32").astype(U64) | (block.read(high, "b32").astype(U64) << U64(32))
    chosen = block.read(selector, "b32").astype(U64)
    result = np.zeros(block.threads, U64)
    for byte in range(4):
        which = (chosen >> U64(4 * byte)) & U64(15)
        found = (both >> ((which & U64(7)) * U64(8))) & U64(255)
        replicated = np.where((found >> U64(7)) & U64(1), U64(255), U64(0))
        result |= np.where(which & U64(8), replicated, found) << U64(8 * byte)
    block.write(target, result.astype(U32))


@instruction("add", "sub", "mul", "mad", "fma", "div", "rem", "max", "min", "neg", "abs")
def _(block: Block, step: Instruction) -> None:
    if step.kind == "f32":
        _float(block, step)
    elif "wide" in step.modifiers:
        _wide(block, step)
    elif step.kind[0] in "usb":
        _integer(block, step)
    else:
        raise NotImplementedError(f"the emulator does not know {step.text!r}")


@instruction("ex2", "lg2", "sqrt", "rcp", "rsqrt")
def _float(block: Block, step: Instruction) -> None:
    x = [float32(block.read(operand, "f32")) for operand in step.operands[1:]]
    if step.name == "fma":
        value = x[0].astype(np.float64) * x[1] + x[2]
    elif len(x) == 1:
        value = _UNARY[step.name](x[0])
    elif "NaN" in step.modifiers:
        value = {"max": np.maximum, "min": np.minimum}[step.name](*x)
    else:
        value = _BINARY[step.name](*x)
    block.write(step.operands[0], float32_pattern(value))


def _wide(block: Block, step: Instruction) -> None:
    """Twice as many bits as the factors."""
    kind = step.kind
    a, b = (integer(block.read(operand, kind), kind) for operand in step.operands[1:3])
    result = f"u{2 * bits_of(kind)}"
    value = pattern(a * b, result)
    if step.name == "mad":
        value = pattern(value + block.read(step.operands[3], result), result)
    block.write(step.operands[0], value)


def _integer(block: Block, step: Instruction) -> None:
    kind = step.kind
    a, *rest = (integer(block.read(operand, kind), kind) for operand in step.operands[1:])
    if step.name in ("neg", "abs"):
        value = -a if step.name == "neg" else np.abs(a)
    elif step.name == "mul" and "hi" in step.modifiers:
        if is_wide(kind):
            raise NotImplementedError(f"the emulator does not know {step.text!r}")
        value = (a * rest[0]) >> np.array(32, a.dtype)
    elif step.name in ("add", "sub", "mul"):
        value = _BINARY[step.name](a, rest[0])
    elif step.name == "mad":
        value = a * rest[0] + rest[1]
    elif step.name in ("max", "min"):
        value = _BINARY[step.name](a, rest[0]) if a.dtype == U64 else getattr(np, f"{step.name}imum")(a, rest[0])
    else:
        value = _quotient(a, rest[0], step.name == "rem")
    block.write(step.operands[0], pattern(value, kind))


def _quotient(a: Array, b: Array, remainder: bool) -> Array:
    """Toward zero; a division by zero gives what some GPU might: zero."""
    nonzero = np.where(b == 0, 1, b).astype(a.dtype)
    floor = a // nonzero
    quotient = floor + ((floor < 0) & (floor * nonzero != a)).astype(a.dtype)
    return a - quotient * nonzero if remainder else quotient


@instruction("cvt")
def _(block: Block, step: Instruction) -> None:
    *_, to, source = step.modifiers
    inputs = [block.read(operand, source) for operand in step.operands[1:]]
    if to.endswith("x2"):
        # the first source becomes the upper half
        high, low = (half_pattern(float32(x), to) for x in inputs)
        block.write(step.operands[0], low | (high << U32(16)))
        return
    (x,) = inputs
    if to in ("bf16", "f16"):
        value: Array = half_pattern(float32(x), to)
    elif to == "tf32":
        value = (x.astype(U32) + U32(0x1000)) & U32(0xFFFFE000)
    elif to == "f32":
        number = half(x, source) if source in ("bf16", "f16") else integer(x, source).astype(np.float64)
        value = float32_pattern(number)
    elif source == "f32":
        toward = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[step.modifiers[0]]
        value = pattern(toward(float32(x)).astype(np.int64), to)
    else:
        value = pattern(integer(x, source), to)
    block.write(step.operands[0], value)
