#!/usr/bin/env bash
# triton 3.7.1 (torch 2.13.0), TRITON_INTERPRET=1: arithmetic with the counter of a loop.
#
# Expected: the numbers of the compiled program, where a counter is an int32 as an argument is: // and % toward zero, and
# products that wrap around.
# Seen: the interpreter's counters are Python's integers. So // and % of a negative one are Python's, and a product that
# overflows on a GPU, of an offset for one, is right. With an argument in the counter's place all three are as compiled.
# Nothing says so. (The documentation says that // and % of scalars alone follow Python; neither the compiled program nor
# the interpreter's arguments do. triton 3.9.0 does the same.)
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 triton==3.7.1 numpy==2.3.5
cat > "$dir/loop.py" <<'PY'
import warnings

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def by_counter(out, first, last):
    for k in range(first, last):
        tl.store(out, k // 2)
        tl.store(out + 1, k % 3)
        tl.store(out + 2, k * 1000000000)


@triton.jit
def by_argument(out, k, unused):
    tl.store(out, k // 2)
    tl.store(out + 1, k % 3)
    tl.store(out + 2, k * 1000000000)


warnings.simplefilter("ignore" if not triton.knobs.runtime.interpret else "error")
if triton.knobs.runtime.interpret:
    found = {}
    for name, kernel in (("counter", by_counter), ("argument", by_argument)):
        found[name] = torch.zeros(3, dtype=torch.int64)
        kernel[(1,)](found[name], -7, -6)
    k = torch.tensor(-7, dtype=torch.int32)
    right = [torch.div(k, 2, rounding_mode="trunc").item(), torch.fmod(k, 3).item(), (k * 1000000000).item()]
    print(f"-7 // 2, -7 % 3, -7 * 1000000000 in int32: {right}", *(f"by {n}: {x.tolist()}" for n, x in found.items()), sep="; ")
    assert found["argument"].tolist() == right and found["counter"].tolist() == [-7 // 2, -7 % 3, -7 * 1000000000]
else:
    for kernel, names in ((by_counter, ("out", "first", "last")), (by_argument, ("out", "k", "unused"))):
        types = dict(zip(names, ("*i64", "i32", "i32"), strict=True))
        program = triton.compile(ASTSource(kernel, types), target=GPUTarget("cuda", 80, 32)).asm["ttir"]
        seen = [line for line in program.splitlines() if any(f"arith.{what} " in line for what in ("divsi", "remsi", "muli"))]
        print(f"{kernel.fn.__name__}, compiled:", *(line.split("=")[1].split("loc(")[0].strip() for line in seen), sep="\n  ")
        assert len(seen) == 3 and all(": i32" in line for line in seen)
PY
TRITON_CACHE_DIR="$dir/cache" "$dir/bin/python" "$dir/loop.py"
TRITON_INTERPRET=1 "$dir/bin/python" "$dir/loop.py"
