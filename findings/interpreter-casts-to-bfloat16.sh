#!/usr/bin/env bash
# triton 3.7.1 (torch 2.13.0), TRITON_INTERPRET=1: .to(tl.bfloat16), and what is stored through a pointer to bfloat16.
#
# Expected: the nearest number of bfloat16, as the documentation of tl.cast says (rounding "rtne" where none is asked for),
# and as tensors of float16 get it. The interpreter does not support arithmetic in bfloat16, and its manual says so: it
# advises casts.
# Seen: float32 is cut off toward zero, with "rtne" asked for, too: twice the error, and on the average too small. Integers
# and float64 become the number whose bits they are, without a word. (triton 3.9.0 does the same.)
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 triton==3.7.1 numpy==2.3.5
cat > "$dir/casts.py" <<'PY'
import warnings

import torch
import triton
import triton.language as tl


@triton.jit
def cast(x, out, ROUNDING: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.load(x + i)
    if ROUNDING == "rtne":
        value = value.to(out.dtype.element_ty, fp_downcast_rounding="rtne")
    tl.store(out + i, value)  # casts, where nothing did


def found(x, dtype, rounding=None):
    out = torch.empty(x.shape, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        cast[(1,)](x, out, rounding, len(x))
    return out


torch.manual_seed(0)
x = torch.rand(1024) + 1
error = {}
casts = {
    "float16": (torch.float16, "rtne"), "bfloat16": (torch.bfloat16, None), "bfloat16, rtne": (torch.bfloat16, "rtne"),
}
for name, (dtype, rounding) in casts.items():
    off = (found(x, dtype, rounding).double() - x.double()) / torch.finfo(dtype).eps
    error[name] = (off.abs().max().item(), off.mean().item())
    print(f"float32 to {name}: off by {error[name][0]:.3f} units at most, {error[name][1]:+.3f} on the average")
assert error["float16"][0] <= 0.5
for name in ("bfloat16", "bfloat16, rtne"):
    assert error[name][0] > 0.9 and -0.6 < error[name][1] < -0.4
for dtype in (torch.int32, torch.int64, torch.float64):
    numbers = torch.arange(1, 5).to(dtype)
    seen = found(numbers, torch.bfloat16)
    print(f"{dtype} {numbers.tolist()}: {seen.tolist()}, to float16: {found(numbers, torch.float16).tolist()}")
    assert torch.equal(found(numbers, torch.float16), numbers.half()) and torch.equal(seen.view(torch.int16), numbers.short())
PY
TRITON_INTERPRET=1 "$dir/bin/python" "$dir/casts.py"
