"""Give a trained vision transformer HyperGLU attention, and fine-tune it back.

    python examples/swap_vit.py
    python examples/swap_vit.py --mixer hypermlp --epochs 40

A small ViT of transformers learns scikit-learn's handwritten digits (1797 pictures of 8 x 8, which come with the
package). Then its attention is swapped, the new layers started afresh or from the attention they
replace, and all are tuned for the same few epochs, the softmax model too. At the end the tables of the
swapped model are resized, and it reads the digits at another size. Needs transformers 5.10 or later and scikit-learn:
in a clone, pip install -e ".[hf]" scikit-learn.
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from hypermlp import swap_attention
from hypermlp.integrations import resize_positions

SMALL = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
DIGITS = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
START = {"initializer_range": 0.15}  # 1 / sqrt(hidden_size); the usual 0.02 is for wide models and learns slowly here


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pictures ``[N, 1, 8, 8]`` around zero and labels ``[N]``: a third, mixed, to test, the rest to train."""
    data = load_digits()
    pictures = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(order) // 3], order[len(order) // 3 :]
    return pictures[train], labels[train], pictures[test], labels[test]


def train(model: ViTForImageClassification, pictures: Tensor, labels: Tensor, epochs: int, lr: float) -> None:
    """AdamW on batches of 64, each picture moved by up to a pixel; the learning rate falls to zero."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    batches = (len(labels) + 63) // 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * batches, pct_start=0.2)
    model.train()
    for epoch in range(epochs):
        total = 0.0
        for batch in torch.randperm(len(labels), generator=generator).split(64):
            down, right = torch.randint(-1, 2, (2,), generator=generator).tolist()
            moved = pictures[batch].roll((down, right), dims=(2, 3))
            loss = F.cross_entropy(model(moved).logits, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        if (epoch + 1) % 10 == 0:
            print(f"  epoch {epoch + 1:3d}   loss {total / len(labels):.3f}", flush=True)


@torch.no_grad()
def accuracy(model: ViTForImageClassification, pictures: Tensor, labels: Tensor) -> float:
    """Per cent of pictures named rightly."""
    model.eval()
    named = model(pictures, interpolate_pos_encoding=True).logits.argmax(-1)
    return 100 * float((named == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixer", default="hyperglu", choices=["hyperglu", "hypermlp"])
    parser.add_argument("--epochs", type=int, default=30, help="that train the softmax model")
    parser.add_argument("--tune-epochs", type=int, default=20, help="of fine-tuning after the swap")
    args = parser.parse_args()

    pictures, labels, test_pictures, test_labels = digits()
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**SMALL, **DIGITS, **START))
    print(f"Training a ViT of {model.num_parameters():,} parameters for {args.epochs} epochs")
    train(model, pictures, labels, args.epochs, lr=3e-3)
    print(f"Accuracy: {accuracy(model, test_pictures, test_labels):.1f} % of {len(test_labels)} test pictures\n")

    rows = []
    for name, init in (
        ("softmax, left as it is", None),
        ("swapped, fresh", "fresh"),
        ("swapped, from_attention", "from_attention"),
    ):
        tuned = copy.deepcopy(model)
        torch.manual_seed(1)
        if init is not None:
            print(swap_attention(tuned, args.mixer, init=init))
        at_first = accuracy(tuned, test_pictures, test_labels)
        train(tuned, pictures, labels, args.tune_epochs, lr=2e-3)
        rows.append((name, at_first, accuracy(tuned, test_pictures, test_labels), tuned.num_parameters()))

    print(f"\n{'accuracy, %':<26}{'after the swap':>16}{f'{args.tune_epochs} epochs later':>18}{'parameters':>14}")
    for name, first, last, parameters in rows:
        print(f"{name:<26}{first:>16.1f}{last:>18.1f}{parameters:>14,}")

    # 6 x 6 patches in the place of 4 x 4; the class token comes before them
    resize_positions(tuned, (6, 6), prefix_tokens=1)
    larger = F.interpolate(test_pictures, size=12, mode="bicubic")
    print(
        f"\nTables resized, the same pictures at 12 x 12: {accuracy(tuned, larger, test_labels):.1f} %, untrained there"
    )


if __name__ == "__main__":
    main()
