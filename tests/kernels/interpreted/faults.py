"""Kernels that are wrong on purpose, and ways to put them in the place of right ones."""

from collections.abc import Callable
from types import ModuleType

import pytest
import triton
import triton.language as tl

from hypermlp_kernels import blocks, decode, visibility

# an interpreted function finds what it calls among the globals alone
RIGHT_ROWS, RIGHT_SCALES, RIGHT_VISIBLE = blocks.table_rows, blocks.scale_rows, visibility.visible
RIGHT_DECODE_ROWS, RIGHT_STRETCHES = decode.table_rows, visibility.stretches


@triton.jit
def next_table_rows(
    p_table, x0, max_lag, NG: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, EDGE: tl.constexpr = True
):
    return RIGHT_ROWS(p_table, x0 + 1, max_lag, NG, BN, BR, EDGE)


@triton.jit
def next_scale_rows(p_scale, x0, max_lag, NG: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr = True):
    return RIGHT_SCALES(p_scale, x0 + 1, max_lag, NG, BN, EDGE)


@triton.jit
def next_decode_rows(
    o_slot, inside, newest, slots, max_lag, start, p_hole, valid_slot, BY_LAG: tl.constexpr, HOLES: tl.constexpr
):
    return RIGHT_DECODE_ROWS(o_slot + 1, inside, newest, slots, max_lag, start, p_hole, valid_slot, BY_LAG, HOLES)


@triton.jit
def never_hidden(t, rows, C: tl.constexpr):
    return t < 0


@triton.jit
def visible_without_mask(t, rows, p_valid, C: tl.constexpr):
    # the interpreter takes what is Python's
    return RIGHT_VISIBLE(t, rows, p_valid, C._replace(HOLES=False))


@triton.jit
def late_stretches(rows, t_first, t_stop, C: tl.constexpr):
    return RIGHT_STRETCHES(rows, tl.minimum(t_first + 1, t_stop), t_stop, C)


Break = Callable[[pytest.MonkeyPatch], None]


def replaced(module: ModuleType, name: str, wrong: object) -> Break:
    return lambda monkeypatch: monkeypatch.setattr(module, name, wrong)


class Kernel:
    """Stands in for a kernel: it raises, or does nothing, or leaves a NaN in the argument at ``position``."""

    def __init__(self, right: object, how: str, position: int) -> None:
        self.right, self.how, self.position = right, how, position

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: object, **options: object) -> None:
            if self.how == "raises":
                raise RuntimeError("Triton Error [CUDA]: an illegal instruction was encountered")
            if self.how == "leaves a NaN":
                self.right[grid](*args, **options)
                args[self.position].view(-1)[-1] = float("nan")

        return launch


def broken(module: ModuleType, name: str, how: str, position: int = 0) -> Break:
    name += "_kernel"
    return lambda monkeypatch: monkeypatch.setattr(module, name, Kernel(getattr(module, name), how, position))
