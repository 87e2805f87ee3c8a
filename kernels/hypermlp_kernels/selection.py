"""The selection, ``relu(gate) softplus(scale)`` or ``relu(gate)``, its slopes, and norms of any size."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# units of the two sums of squares (norm_of) and where the one of small numbers comes to its end
SMALL = tl.constexpr(2.0**-40)
LARGE = tl.constexpr(2.0**66)
FULL = tl.constexpr(2.0**124)


@triton.jit
def _exp2_of_minus(b_u, ASM: tl.constexpr):
    """``2^-|u|``."""
    if ASM:
        # both signs are free here, and would be instructions outside
        return tl.inline_asm_elementwise(
            "{.reg .f32 x; abs.f32 x, $1; neg.f32 x, x; ex2.approx.ftz.f32 $0, x;}",
            "=f,f", [b_u], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:  # noqa: RET505  a compile-time branch
        return tl.exp2(-tl.abs(b_u))


@triton.jit
def _log2_of_one_and(e, ASM: tl.constexpr):
    """``log2(1 + e)`` to the precision of the type."""
    if ASM:
        # tl.log2 is a polynomial of two dozen instructions
        log = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + e], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        log = tl.log2(1.0 + e)
    # 1 + e drops the low bits of a small e: a row whose scale map is far below zero would lose its digits
    series = e * (1.4426950408889634 + e * (-0.7213475204444817 + e * 0.4808983469629878))
    return tl.where(e < 0.015625, series, log)


@triton.jit
def softplus2(b_u, EXACT: tl.constexpr, ASM: tl.constexpr):
    """``log2(1 + 2^u)``: softplus in units of ln 2 of an argument in the same units.

    Where products are rounded (not ``EXACT``): ``e`` times a polynomial in ``e = 2^-|u|`` of degree 5,
    the best for the relative error, 8.5e-6. What the hardware's logarithm leaves of a small ``e`` is no better.
    """
    e = _exp2_of_minus(b_u, ASM)
    b_positive = tl.maximum(b_u, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if EXACT:
        return b_positive + _log2_of_one_and(e, ASM)
    else:  # noqa: RET505  a compile-time branch
        p = 0.469173876 + e * (-0.303035677 + e * (0.146032290 + e * -0.0344356683))
        return b_positive + e * (1.44268292 + e * (-0.720426141 + e * p))


@triton.jit
def sigmoid2(b_u, ASM: tl.constexpr):
    """``1 / (1 + 2^-u)``: the sigmoid of an argument in units of ln 2."""
    if ASM:
        # 2^-u overflows where the sigmoid is less than any normal number, and then it is zero
        e = tl.inline_asm_elementwise(
            "{.reg .f32 x; neg.f32 x, $1; ex2.approx.ftz.f32 $0, x;}",
            "=f,f", [b_u], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + e], dtype=tl.float32, is_pure=True, pack=1
        )
    else:  # noqa: RET505  a compile-time branch
        e = _exp2_of_minus(b_u, ASM)
        return tl.where(b_u >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def select(b_gate, b_scale, GLU: tl.constexpr, EXACT: tl.constexpr, ASM: tl.constexpr):
    """``relu(g) softplus(u)``, in units of ln 2, or ``relu(g)``. A NaN stays one."""
    b_a = tl.maximum(b_gate, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if GLU:
        b_a = b_a * softplus2(b_scale, EXACT, ASM)
    return b_a


@triton.jit
def norm_of(b_small, b_large):
    """A norm from the sums of the squares of ``x / SMALL`` and of ``x / LARGE``. A NaN stays one.

    Squares in one unit overflow, or vanish, long before the norm does; these two have norms from 2^-84 to 2^127.
    """
    return tl.where(b_small < FULL, tl.sqrt(b_small) * SMALL, tl.sqrt(b_large) * LARGE)
