#!/usr/bin/env bash
# triton 3.7.1 (torch 2.13.0), TRITON_INTERPRET=1: tl.dot of two bfloat16 tiles.
#
# Expected: the product, up to bfloat16's rounding, as for float16; or an error.
# Seen: finite nonsense, off by many orders of magnitude: the interpreter keeps bfloat16 as 16-bit integers and
# multiplies those. (triton 3.9.0 does the same. Its manual says that the interpreter does not support bfloat16, and the
# project's issue 11584 is closed as that; nothing says it when a kernel runs.)
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 triton==3.7.1 numpy==2.3.5
cat > "$dir/product.py" <<'PY'
import torch
import triton
import triton.language as tl


@triton.jit
def product(x, y, out, N: tl.constexpr):
    i = tl.arange(0, N)
    place = i[:, None] * N + i[None, :]
    tl.store(out + place, tl.dot(tl.load(x + place), tl.load(y + place)))


error = {}
for dtype in (torch.float16, torch.bfloat16):
    torch.manual_seed(0)
    x, y = (torch.randn(16, 16).to(dtype) for _ in range(2))
    out = torch.empty(16, 16)
    product[(1,)](x, y, out, 16)
    right = x.float() @ y.float()
    error[dtype] = ((out - right).norm() / right.norm()).item()
print(f"relative error of tl.dot: {error}")
assert error[torch.float16] < 1e-3, "float16 was right"
assert error[torch.bfloat16] > 1, "bfloat16 was nonsense"
PY
TRITON_INTERPRET=1 "$dir/bin/python" "$dir/product.py"
