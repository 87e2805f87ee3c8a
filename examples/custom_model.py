"""A HyperGLU layer in a model of your own, trained on a toy task: remembering pairs.

    python examples/custom_model.py

A sequence shows pairs of a key and a value, ``k3 v1 k0 v7 k3 v1 ...``, drawn anew for every
sequence. After a key that was seen before, the model must say its value. Nothing can be memorised:
the answer is in the context alone. Takes under a minute on a laptop.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypermlp import HyperGLU

NUM_KEYS, NUM_VALUES = 8, 8
IGNORED = -100  # what cross_entropy leaves out


class Block(nn.Module):
    """Pre-norm attention and MLP: the one line that differs from a softmax Transformer is marked."""

    def __init__(self, width: int, max_lag: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = HyperGLU(width, num_heads=2, max_lag=max_lag)  # <- here
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    """Token embedding, two blocks, head. No position embedding: the layer knows lags."""

    def __init__(self, width: int, max_lag: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_KEYS + NUM_VALUES, width)
        self.blocks = nn.Sequential(Block(width, max_lag), Block(width, max_lag))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, NUM_VALUES))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.embedding(tokens)))


def make_batch(batch: int, pairs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens ``[batch, 2 * pairs]``, and for each key seen before the value to say after it."""
    values = torch.randint(NUM_VALUES, (batch, NUM_KEYS), generator=generator)
    keys = torch.randint(NUM_KEYS, (batch, pairs), generator=generator)
    answers = values.gather(1, keys)
    tokens = torch.stack((keys, NUM_KEYS + answers), dim=-1).flatten(1)
    same = keys[:, :, None] == keys[:, None]
    seen = same.tril(-1).any(-1)
    targets = torch.full_like(tokens, IGNORED)
    targets[:, ::2] = torch.where(seen, answers, IGNORED)
    return tokens, targets


@torch.no_grad()
def accuracy(model: Model, pairs: int, generator: torch.Generator) -> float:
    """Share of right answers on new sequences."""
    tokens, targets = make_batch(128, pairs, generator)
    asked = targets != IGNORED
    return (model(tokens).argmax(-1)[asked] == targets[asked]).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=24, help="pairs in a training sequence")
    args = parser.parse_args()

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    # room for sequences twice as long as those trained on
    model = Model(args.width, max_lag=4 * args.pairs)
    print(model.blocks[0].attention)
    print(
        f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters; chance is {1 / NUM_VALUES:.0%}\n"
    )

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    for step in range(1, args.steps + 1):
        tokens, targets = make_batch(32, args.pairs, generator)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(1, args.steps // 10) == 0:
            right = accuracy(model, args.pairs, generator)
            print(f"step {step:4d}   loss {loss.item():.3f}   right answers {right:.1%}")

    tokens, targets = make_batch(1, args.pairs, generator)
    answers = model(tokens).argmax(-1)
    print("\nOne new sequence, with the model's answers where a key returns:")
    for key, value, target, answer in zip(
        tokens[0, ::2], tokens[0, 1::2], targets[0, ::2], answers[0, ::2], strict=True
    ):
        asked = "" if target == IGNORED else f"   said v{answer} {'right' if answer == target else 'WRONG'}"
        print(f"  k{key} v{value - NUM_KEYS}{asked}")
    print(f"\nOn sequences twice as long as in training: {accuracy(model, 2 * args.pairs, generator):.1%} right")


if __name__ == "__main__":
    main()
