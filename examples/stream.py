"""Text without end from a small model, in constant memory and at a constant time per token.

    python examples/stream.py                       # trains a tiny model for a few seconds first
    python examples/stream.py runs/demo/hyperglu    # or streams from one that ``hypermlp`` has trained

The model looks ``max_lag`` bytes back. Once the cache holds these, new bytes overwrite the oldest ones: what
comes after forty windows costs what it cost after one. The table at the end shows it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from hypermlp import HyperCache
from hypermlp.generation import sample
from hypermlp.models import LanguageModel
from hypermlp_lab.text import encode
from hypermlp_lab.training.checkpoint import load_model
from hypermlp_lab.training.data import load_corpus
from hypermlp_lab.training.recipe import byte_model


def train_tiny(max_lag: int, seconds: float) -> LanguageModel:
    """Two layers on Python's standard library, for as long as told."""
    torch.manual_seed(0)
    model = LanguageModel(byte_model("hyperglu", hidden_size=64, num_layers=2, seq_len=max_lag))
    text = load_corpus(None).train
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    end, step = time.monotonic() + seconds, 0
    while step == 0 or time.monotonic() < end:
        starts = torch.randint(text.numel() - max_lag - 1, (8, 1))
        windows = text[starts + torch.arange(max_lag + 1)].long()
        loss = model.loss(windows[:, :-1], windows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
    print(f"{model.num_parameters():,} parameters, {step} steps, loss {loss.item():.2f} nats per byte\n")
    return model


@torch.no_grad()
def stream(model: LanguageModel, prompt: str, count: int, windows_per_row: int, max_lag: int) -> None:
    cache, tokens = HyperCache(max_crop=0), encode(prompt)
    generator = torch.Generator().manual_seed(0)
    logits, rows, times = model(tokens, cache=cache), [], []
    print(prompt, end="")
    for index in range(1, count + 1):
        token = sample(logits[:, -1], temperature=0.7, top_p=0.95, generator=generator)
        byte = chr(int(token))
        print(byte if byte == "\n" or " " <= byte <= "~" else ".", end="", flush=True)
        start = time.perf_counter()
        logits = model(token[:, None], cache=cache)
        times.append(time.perf_counter() - start)
        if index % (windows_per_row * max_lag) == 0 or index == count:
            rows.append((index, 1e3 * statistics.median(times), cache.nbytes))
            times = []
    print(f"\n\n{'tokens':>8} {'windows':>8} {'ms/token':>9} {'cache bytes':>12}")
    for index, milliseconds, held in rows:
        print(f"{index:8d} {index / max_lag:8.1f} {milliseconds:9.3f} {held:12,d}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", help="folder of a run or of one checkpoint")
    parser.add_argument("--windows", type=int, default=20, help="how many times max_lag to stream")
    parser.add_argument("--max-lag", type=int, default=128, help="of the model trained here")
    parser.add_argument("--seconds", type=float, default=12.0, help="of training")
    parser.add_argument("--prompt", default="import ")
    args = parser.parse_args()

    torch.set_num_threads(1)  # a model this small gains nothing from more
    model = train_tiny(args.max_lag, args.seconds) if args.checkpoint is None else load_model(args.checkpoint)
    max_lag = model.config.attention.max_lag
    if max_lag is None:
        parser.error("this model has no window, so its cache grows with the text: train one with --max-lag")
    stream(model.eval(), args.prompt, args.windows * max_lag, max(1, args.windows // 10), max_lag)


if __name__ == "__main__":
    main()
