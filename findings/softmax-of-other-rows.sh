#!/usr/bin/env bash
# triton 3.7.1 (torch 2.13.0): tl.softmax(x, dim=1) of a square tile.
#
# Expected: the softmax of each row, as of each column with dim=0; or an error, as a tile that is not square gives.
# Seen: element (i, j) is made with the largest number and the sum of row j, so rows do not add up to 1. keep_dims=True, an
# option without a description, gives the softmax. The compiled program and the interpreter agree on this. (The project's
# issue 11406; it is right in triton 3.9.0, where keep_dims is deprecated.)
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 triton==3.7.1 numpy==2.3.5
cat > "$dir/softmax.py" <<'PY'
import re
import warnings

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def kernel(x, out, DIM: tl.constexpr, KEEP: tl.constexpr, N: tl.constexpr):
    place = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + place, tl.softmax(tl.load(x + place), dim=DIM, keep_dims=KEEP))


warnings.simplefilter("error", UserWarning)
if triton.knobs.runtime.interpret:
    torch.manual_seed(0)
    x, off = torch.randn(16, 16), {}
    for dim, keep in ((0, False), (1, False), (1, True)):
        out = torch.empty(16, 16)
        kernel[(1,)](x, out, dim, keep, 16)
        off[dim, keep] = (out - x.softmax(dim)).abs().max().item()
        sums = out.sum(dim)
        print(f"dim={dim}, keep_dims={keep}: off by {off[dim, keep]:.2g}, sums from {sums.min():.2f} to {sums.max():.2f}")
        if (dim, keep) == (1, False):
            largest, powers = x.max(1).values, (x - x.max(1).values).exp()
            assert torch.allclose(out, powers / powers.sum(1))
    assert off[0, False] < 1e-6 and off[1, True] < 1e-6 and off[1, False] > 0.1
else:
    types = {"x": "*fp32", "out": "*fp32", "DIM": "constexpr", "KEEP": "constexpr", "N": "constexpr"}
    for keep in (False, True):
        source = ASTSource(kernel, types, {(2,): 1, (3,): keep, (4,): 16})
        program = triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ttir"]
        axes = re.findall(r"tt.expand_dims .*{axis = (\d) : i32} : tensor<16xf32>", program)
        print(f"compiled, keep_dims={keep}: what was reduced along 1 stands along {axes}")
        assert axes == (["1"] * 2 if keep else ["0"] * 2)
PY
TRITON_CACHE_DIR="$dir/cache" "$dir/bin/python" "$dir/softmax.py"
TRITON_INTERPRET=1 "$dir/bin/python" "$dir/softmax.py"
