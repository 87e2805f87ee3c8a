"""Small calls for compute-sanitizer: every kernel behind ``backend="triton"`` once or more, a few blocks each.

A script, not collected: ``compute-sanitizer --tool memcheck python tests/kernels/device/sanitized.py``.
"""

import torch
from place import DEVICE, ON_GPU, Case, operator_case

# isort: split
from conv_cases import Conv

EDGES = [[0] * 5 + [1] * 65, [1] * 63 + [0] * 7]
CASES = {
    "glu bfloat16": (Case(T=150, K=64, V=70, R=(16, 16), rows=110), torch.bfloat16),
    "glu bfloat16, rows in parts": (Case(T=1300 if ON_GPU else 40), torch.bfloat16),
    "relu bfloat16": (Case(T=70, K=20, V=33, R=(5, 3), selection="relu"), torch.bfloat16),
    "glu float16, padding": (Case(T=70, B=2, mask=EDGES), torch.float16),
    "glu float32, packed": (Case(T=70, bounds=[0, 1, 18, 70]), torch.float32),
    "glu bfloat16, by position": (Case(T=70, layout="position", causal=False), torch.bfloat16),
}
CONVOLUTIONS = {
    "convolution bfloat16, with a past": Conv(T=150, D=70, past=True, dtype=torch.bfloat16),
    "convolution float32, packed": Conv(T=150, B=1, D=64, bounds=(0, 1, 18, 150), dtype=torch.float32),
}


def main() -> None:
    for name, (small, dtype) in CASES.items():
        case, hidden = operator_case(small, dtype)
        tensors = {n: x.requires_grad_() for n, x in case.tensors.items()}
        o = case.with_tensors(tensors).run("triton", **hidden)
        torch.autograd.grad(o.float().square().sum(), list(tensors.values()))
        done(name)
    for name, conv in CONVOLUTIONS.items():
        conv.run("triton", conv.tensors(DEVICE))
        done(name)


def done(name: str) -> None:
    if ON_GPU:
        torch.cuda.synchronize()
    print(f"{name}: ran on {DEVICE}", flush=True)


if __name__ == "__main__":
    main()
