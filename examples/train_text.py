"""Train a HyperGLU language model on your own text, and let it write.

    python examples/train_text.py notes/            # a folder of text files
    python examples/train_text.py book.txt --steps 2000

Bytes are the tokens, so any language and any format will do. Stopped with Ctrl-C, it saves a checkpoint
and goes on from there when started again with the same arguments. ``hypermlp train`` is the same with
more options.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from hypermlp.generation import generate
from hypermlp.models import LanguageModel
from hypermlp_lab.text import decode, encode
from hypermlp_lab.training import Trainer, TrainingConfig, load_corpus
from hypermlp_lab.training.recipe import byte_model


class Lines:
    """Prints what the trainer reports."""

    def on_step(self, step: int, loss: float, tokens_per_second: float) -> None:
        if step % 20 == 0:
            print(f"step {step:5d}   loss {loss:.3f} nats   {tokens_per_second:,.0f} tokens/s", flush=True)

    def on_evaluation(self, point: dict[str, float]) -> None:
        print(f"step {point['step']:5.0f}   validation {point['bits_per_byte']:.3f} bits per byte", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="a text file, or a folder of them")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--prompt", default="The ")
    parser.add_argument("--out", type=Path, default=Path("runs/my-text"), help="where checkpoints go")
    args = parser.parse_args()

    corpus = load_corpus(args.text)
    print(f"{corpus.train.numel():,} bytes to train on, {corpus.validation.numel():,} to validate")

    torch.manual_seed(0)
    config = byte_model("hyperglu", hidden_size=args.hidden_size, num_layers=args.layers, seq_len=args.seq_len)
    model = LanguageModel(config)
    print(f"{model.num_parameters():,} parameters")

    training = TrainingConfig(steps=args.steps, seq_len=args.seq_len)
    trainer = Trainer(model, corpus, training, out=args.out, watcher=Lines())
    if trainer.resume():
        print(f"going on from step {trainer.progress.step}")
    if not trainer.run():
        print("stopped; start again with the same arguments to go on")
        return

    tokens = generate(model, encode(args.prompt), 200, temperature=0.8, seed=0)
    print(f"\n{decode(tokens[0])}")


if __name__ == "__main__":
    main()
