"""Two faults of Triton's interpreter (3.6 to 3.9), repaired while the checks run, and most of its time saved.

It multiplies bfloat16 operands of a dot as if their bit patterns were integers, and it cuts float32 off
to bfloat16 where hardware rounds to nearest even.

Most of its time goes into work without effect: every call of a device function patches all of
``triton.language`` once more, and every sum and product of integers is computed again in 64 bits, to see whether
it overflows, for an assertion that is then not made (it needs debug). And every tensor of a kernel makes its type,
its shape and NumPy's dtype for it anew, which are few: they are kept. So is the tile that a number becomes beside a
tensor, and two tensors of one shape and type are taken as they are.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _widen(x: TensorHandle) -> TensorHandle:
    if x.dtype.scalar != tl.bfloat16:
        return x
    return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def _once(patch: Callable[[FunctionType], Any]) -> Callable[[FunctionType], SimpleNamespace]:
    """``patch`` for the first function that sees a module of the language. It stays, for a restored one is no other."""
    done: set[int] = set()
    known: set[FunctionType] = set()
    patched = SimpleNamespace(restore=lambda: None)

    def patch_lang(function: FunctionType) -> SimpleNamespace:
        if function not in known:
            known.add(function)
            seen = {id(x) for x in function.__globals__.values() if x is tl or x is tl.core}
            if not seen <= done:
                patch(function)
                done.update(seen)
        return patched

    return patch_lang


def _keep_types() -> None:
    block_init, tensor_init, numpy_dtype = tl.block_type.__init__, tl.tensor.__init__, interpreter._get_np_dtype
    blocks: dict[tuple[Any, ...], dict[str, Any]] = {}
    shapes: dict[tuple[int, ...], tuple[Any, Any]] = {}
    dtypes: dict[str, np.dtype] = {}

    def init_block(self, element_ty, shape):
        sizes = [tl.core._unwrap_if_constexpr(size) for size in shape]
        key = (element_ty.name, *sizes, *map(type, sizes))  # 16.0 is equal to 16, and refused
        if key not in blocks:
            block_init(self, element_ty, shape)
            blocks[key] = vars(self).copy()
        vars(self).update(blocks[key])

    def init_tensor(self, handle, type):
        key = tuple(type.shape) if type.is_block() else ()
        if key not in shapes:
            tensor_init(self, handle, type)
            shapes[key] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[key]

    def get_np_dtype(type):
        if type.name not in dtypes:
            dtypes[type.name] = numpy_dtype(type)
        return dtypes[type.name]

    tl.block_type.__init__, tl.tensor.__init__, interpreter._get_np_dtype = init_block, init_tensor, get_np_dtype


def _keep_operands() -> None:
    checked, compatible = TritonSemantic.binary_op_type_checking_impl, TritonSemantic.broadcast_impl_value
    unpromoted = (tl.float32, tl.int32, tl.int64)
    tiles: dict[tuple[Any, ...], tl.tensor] = {}

    def beside(self, lhs, rhs, options):
        """A tensor and a number, which becomes the same tile each time."""
        first = isinstance(lhs, tl.tensor)
        tensor, number = (lhs, rhs) if first else (rhs, lhs)
        key = tensor.type.name, type(number), number, first, options
        if key not in tiles:
            pair = checked(self, lhs, rhs, *options)
            if pair[not first] is not tensor or number != number:
                return pair
            pair[first].handle.data.setflags(write=False)  # who writes into an operand would change all to come
            tiles[key] = pair[first]
        return (lhs, tiles[key]) if first else (tiles[key], rhs)

    def operands(self, lhs, rhs, *options):
        tensors = isinstance(lhs, tl.tensor) + isinstance(rhs, tl.tensor)
        if tensors == 1:
            return beside(self, lhs, rhs, options)
        if tensors and lhs.shape is rhs.shape and lhs.dtype is rhs.dtype and lhs.dtype in unpromoted:
            return lhs, rhs
        return checked(self, lhs, rhs, *options)

    def broadcast(self, lhs, rhs):
        return (lhs, rhs) if lhs.shape is rhs.shape else compatible(self, lhs, rhs)

    TritonSemantic.binary_op_type_checking_impl, TritonSemantic.broadcast_impl_value = operands, broadcast


@cache
def repair() -> None:
    """Patch the interpreter, once. For this process: checks run in one of their own."""
    interpreter._patch_lang = _once(interpreter._patch_lang)
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = replace(builder.options, sanitize_overflow=False)
    _keep_types()
    _keep_operands()
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return dot(self, _widen(a), _widen(b), d, input_precision, max_num_imprecise_acc)

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return TensorHandle(_round_to_bfloat16(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl
    InterpreterBuilder.create_fp_trunc = cast_impl


def pytest_configure() -> None:
    """As a plugin of pytest (``-p repairs``), for tests that know nothing of the interpreter."""
    repair()
