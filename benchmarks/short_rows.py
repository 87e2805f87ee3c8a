"""How a layer answers to the size of its input and at the start of a sequence: figures of the guide, in seconds.

    python benchmarks/short_rows.py
    python benchmarks/short_rows.py --train    # does a larger eps cost anything? some minutes

Prints, for freshly made layers: the largest input scale that float16 holds without a norm before the layer; how the
output grows with the input; the spread of the input's gradient in short sequences; and what integrated gradients
leave unexplained.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from hypermlp import HyperGLU, HyperMLP, SoftmaxAttention, hyper_attention

WIDTH, SEEDS = 64, 3
LAYERS = {"HyperGLU": HyperGLU, "HyperMLP": HyperMLP, "softmax": SoftmaxAttention}


def make(name: str, seed: int, **options: object) -> nn.Module:
    torch.manual_seed(seed)
    return LAYERS[name](WIDTH, max_lag=256, **options)


@torch.no_grad()
def growth(name: str, length: int = 64) -> list[float]:
    """Output size at input scales of 1, 4, 16 and 64, relative to the first."""
    layer, x = make(name, 0), torch.randn(1, length, WIDTH)
    sizes = [float(layer(scale * x).norm()) for scale in (1.0, 4.0, 16.0, 64.0)]
    return [size / sizes[0] for size in sizes]


@torch.no_grad()
def float16_limit(name: str, length: int = 64) -> int | None:
    """First input scale, in steps of 5 percent up to 10000, at which a float16 layer is not finite."""
    layer, x = make(name, 0).half(), torch.randn(1, length, WIDTH)
    scale = 1.0
    while scale < 1e4:
        if not layer((scale * x).half()).isfinite().all():
            return round(scale)
        scale *= 1.05
    return None


def gradient_spread(name: str, length: int, **options: object) -> float:
    """Largest over median size of a token's input gradient, over the tokens of 4096; mean over seeds."""
    found = []
    for seed in range(SEEDS):
        layer = make(name, seed, **options)
        x = torch.randn(4096 // length, length, WIDTH, requires_grad=True)
        (grad,) = torch.autograd.grad(layer(x), x, torch.randn_like(x))
        sizes = grad.norm(dim=-1).flatten()
        found.append(float(sizes.max() / sizes.median()))
    return sum(found) / SEEDS


def unexplained(norm: bool, steps: int = 1000, length: int = 16) -> tuple[float, float]:
    """What the integrated gradients of the queries, from zero, leave of the last output's change; and that change."""
    torch.manual_seed(0)
    q, k = (0.5 * torch.randn(1, length, 2, 8).double() for _ in range(2))
    v = torch.randn(1, length, 1, 8).double()

    def read(q: Tensor) -> Tensor:
        return hyper_attention(q, k, v, selection="glu", norm=norm)[0, -1].sum()

    total = torch.zeros_like(q)
    for step in range(steps):
        at = (q * ((step + 0.5) / steps)).requires_grad_()
        total += torch.autograd.grad(read(at), at)[0] / steps
    change = float(read(q) - read(torch.zeros_like(q)))
    return abs(change - float((total * q).sum())), abs(change)


class Block(nn.Module):
    """Attention and an MLP."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attention = HyperGLU(WIDTH, max_lag=64, mix_rank=8, eps=eps)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def train(eps: float, seed: int, steps: int = 250) -> tuple[float, float]:
    """Validation loss in nats and the largest gradient norm of two blocks on the bytes of this repository's text."""
    root = Path(__file__).resolve().parent.parent
    files = sorted([*root.glob("docs/*.md"), *root.glob("hypermlp/**/*.py")])
    data = torch.tensor(list(b"".join(file.read_bytes() for file in files)))
    bounds = {"train": (0, int(0.9 * len(data))), "validate": (int(0.9 * len(data)), len(data))}
    torch.manual_seed(seed)
    ends = nn.Embedding(256, WIDTH), nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 256)
    model = nn.Sequential(ends[0], Block(eps), Block(eps), *ends[1:])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def loss(part: str, generator: torch.Generator) -> Tensor:
        first, stop = bounds[part]
        starts = torch.randint(first, stop - 65, (16,), generator=generator).tolist()
        tokens = torch.stack([data[start : start + 65] for start in starts])
        return nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    generator, largest = torch.Generator().manual_seed(seed), 0.0
    for _ in range(steps):
        optimizer.zero_grad()
        loss("train", generator).backward()
        largest = max(largest, float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        return sum(float(loss("validate", generator)) for _ in range(20)) / 20, largest


def compare_training() -> None:
    for eps in (1e-12, 0.1, 1.0):
        losses, largest = zip(*(train(eps, seed) for seed in range(3)), strict=True)
        print(
            f"eps={eps:g}: validation {sum(losses) / 3:.3f} nats ({min(losses):.3f} to {max(losses):.3f}), "
            f"largest gradient norm {max(largest):.2f}"
        )


def main() -> None:
    if "--train" in sys.argv[1:]:
        compare_training()
        return
    for name in ("HyperGLU", "HyperMLP"):
        print(f"{name}: output at input scales 1, 4, 16, 64:", *(f"{x:.3g}" for x in growth(name)))
        print(f"{name}: float16, no norm before it, is not finite from an input scale of", float16_limit(name))
    for name in LAYERS:
        spread = (f"{length}: {gradient_spread(name, length):.1f}" for length in (2, 4, 16, 64))
        print(f"{name}: largest over median |dx| at T =", ", ".join(spread))
    for eps in (1e-12, 0.1, 1.0):
        spread = (f"{length}: {gradient_spread('HyperGLU', length, eps=eps):.1f}" for length in (2, 4, 16, 64))
        print(f"HyperGLU, eps={eps:g}: largest over median |dx| at T =", ", ".join(spread))
    for norm in (True, False):
        gap, change = unexplained(norm)
        print(f"norm={norm}: integrated gradients of the queries leave {gap:.2g} of a change of {change:.2g}")


if __name__ == "__main__":
    main()
