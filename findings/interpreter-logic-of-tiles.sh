#!/usr/bin/env bash
# triton 3.7.1 (torch 2.13.0), TRITON_INTERPRET=1: and, or and not between tiles, as masks have them.
#
# Expected: element by element, as the compiler takes them (its program has andi, ori and xori of 16 elements), or an
# error; an error for chained comparisons and for a tile as a condition, which the compiler refuses.
# Seen: any tile of two elements or more counts as true. So "and" is the second tile, "or" the first, "not" false, a chained
# comparison its last part, and what a tile is the condition of is done, without a word. (triton 3.9.0 does the same, but
# for chained comparisons, which are right there. The compiler warns of "and" and "or": they are deprecated.)
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 triton==3.7.1 numpy==2.3.5
cat > "$dir/logic.py" <<'PY'
import re
import warnings

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def kernel(x, y, out, OPERATION: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(x + i), tl.load(y + i)
    result = i
    if OPERATION == "and":
        result = a > 0 and b > 0
    elif OPERATION == "or":
        result = a > 0 or b > 0
    elif OPERATION == "not":
        result = not a > 0
    elif OPERATION == "chained":
        result = 0 < a < b
    elif OPERATION == "condition":
        result = i * 0
        if a > 0:
            result += 1
    tl.store(out + i, result)


x, y = torch.tensor([-1, -1, 1, 1, 2] * 4)[:16].int(), torch.tensor([-1, 1, -1, 3, 1] * 4)[:16].int()
right = {
    "and": (x > 0) & (y > 0), "or": (x > 0) | (y > 0), "not": ~(x > 0), "chained": (x > 0) & (x < y), "condition": None,
}
instruction = {"and": "andi", "or": "ori", "not": "xori"}
if triton.knobs.runtime.interpret:
    seen = {"and": y > 0, "or": x > 0, "not": x != x, "chained": x < y, "condition": x == x}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for operation, expected in right.items():
            out = torch.full((16,), 9, dtype=torch.int32)
            kernel[(1,)](x, y, out, operation, 16)
            print(f"{operation}: {out[:5].tolist()}, right: {'an error' if expected is None else expected[:5].int().tolist()}")
            assert torch.equal(out, seen[operation].int()) and (expected is None or not torch.equal(out, expected.int()))
else:
    types = {"x": "*i32", "y": "*i32", "out": "*i32", "OPERATION": "constexpr", "N": "constexpr"}
    warnings.simplefilter("ignore")
    for operation in right:
        source = ASTSource(kernel, types, {(3,): operation, (4,): 16})
        try:
            program = triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ttir"]
            seen = re.search(r"arith\.(andi|ori|xori) .*(tensor<16xi1>)", program).groups()
        except triton.CompilationError as error:
            seen = (type(error).__name__,)
        print(f"{operation}, compiled: {', '.join(seen)}")
        assert (seen[0] == instruction[operation]) if operation in instruction else len(seen) == 1
PY
TRITON_CACHE_DIR="$dir/cache" "$dir/bin/python" "$dir/logic.py"
TRITON_INTERPRET=1 "$dir/bin/python" "$dir/logic.py"
