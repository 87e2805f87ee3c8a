"""The interpreter with its repairs refuses what it refuses without them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import repairs
import triton.language as tl
from triton.language import semantic
from triton.runtime.interpreter import TensorHandle, interpreter_builder

repairs.repair()


def test_a_kept_type_hides_no_size_of_another_kind() -> None:
    """16.0 is equal to 16, and no size of a tile."""
    assert tl.block_type(tl.float32, [16, 8]).shape == (16, 8)
    for sizes in ([16.0, 8], [16, tl.constexpr(8.0)]):
        with pytest.raises(TypeError):
            tl.block_type(tl.float32, sizes)
    with pytest.raises(ValueError, match="power of 2"):
        tl.block_type(tl.float32, [12, 8])


def test_a_kept_type_is_of_its_own_element() -> None:
    elements = [tl.float32, tl.bfloat16, tl.int32, tl.pointer_type(tl.float32), tl.pointer_type(tl.bfloat16)]
    for _ in range(2):
        for element in elements:
            made = tl.block_type(element, [16, 8])
            assert (made.scalar, made.numel) == (element, 128)
            assert [other for other in elements if made == tl.block_type(other, [16, 8])] == [element]


def untouched() -> semantic.TritonSemantic:
    """What Triton itself makes of two operands: its module once more, which nobody has repaired."""
    found = importlib.util.spec_from_file_location("triton.language.untouched_semantic", semantic.__file__)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module.TritonSemantic(interpreter_builder)


def tensor(element: tl.dtype, dtype: type, shape: list[int]) -> tl.tensor:
    handle = TensorHandle(np.ones(shape or 1, dtype), element)
    return tl.tensor(handle, tl.block_type(element, shape) if shape else element)


def described(check: Callable[..., tuple[tl.tensor, tl.tensor]], *operands: object) -> object:
    try:
        made = check(*operands)
    except Exception as error:
        return type(error).__name__, str(error)
    return [(str(x.type), x.handle.data.dtype, str(x.handle.data.tolist())) for x in made]  # -0.0 is equal to 0.0


@np.errstate(over="ignore")
def test_operands_are_what_they_are_without_repairs() -> None:
    plain, repaired = untouched(), semantic.TritonSemantic(interpreter_builder)
    assert plain.binary_op_type_checking_impl.__func__ is not repaired.binary_op_type_checking_impl.__func__
    dtypes = {tl.float32: np.float32, tl.float16: np.float16, tl.int1: bool, tl.int32: np.int32, tl.int64: np.int64}
    shapes = [[], [4, 2], [4, 1], [1, 2], [8, 2], [2]]
    tensors = [tensor(element, dtype, shape) for (element, dtype), shape in product(dtypes.items(), shapes)]
    pointer = tensor(tl.pointer_type(tl.float32), np.uint64, [])
    numbers = [True, 2, -3, 0.0, -0.0, 0.5, 2**40, float("nan"), tl.constexpr(2), tl.constexpr(2.0)]
    operands = [*tensors, pointer, *numbers]
    for _ in range(2):
        for lhs, rhs in product(operands, repeat=2):
            for options in ((), (True, True), (False, False, True, True)):
                expected = described(plain.binary_op_type_checking_impl, lhs, rhs, *options)
                assert described(repaired.binary_op_type_checking_impl, lhs, rhs, *options) == expected


def test_a_kept_operand_is_not_written_into() -> None:
    repaired = semantic.TritonSemantic(interpreter_builder)
    for number in (0.75, -3):
        _, kept = repaired.binary_op_type_checking_impl(tensor(tl.float32, np.float32, [4, 2]), number)
        with pytest.raises(ValueError, match="read-only"):
            kept.handle.data += 1
