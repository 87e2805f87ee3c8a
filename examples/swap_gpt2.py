"""Give a trained GPT-2 HyperGLU attention, and fine-tune it back.

    python examples/swap_gpt2.py                          # a small GPT-2, trained here first
    python examples/swap_gpt2.py --model gpt2             # pretrained weights, by name or folder
    python examples/swap_gpt2.py --model gpt2 --data notes/ --out swapped/

Compares two ways to start the new layers: afresh, and from the projections of the attention they
replace (``init="from_attention"``). Neither computes what the old model did, since there is no softmax any
more; the table shows how far each is off right after the swap, and after the same short
fine-tuning. The text is the Python standard library's source unless --data names another. Needs transformers:
in a clone, pip install -e ".[hf,lab]".
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from hypermlp import restore_attention, swap_attention
from hypermlp_lab.training import load_corpus

SMALL = {"vocab_size": 256, "n_embd": 128, "n_layer": 3, "n_head": 4}  # bytes are its tokens


def train(
    model: PreTrainedModel, tokens: Tensor, steps: int, *, seq_len: int, batch_size: int, lr: float, seed: int
) -> None:
    """AdamW on random windows of ``tokens``; the learning rate warms up and falls to a tenth."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20) * (1 - 0.9 * step / steps)
        starts = torch.randint(tokens.numel() - seq_len, (batch_size, 1), generator=generator)
        batch = tokens[starts + torch.arange(seq_len + 1)].long()
        loss = next_token_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"  step {step + 1:4d}   loss {loss.item():.3f}", flush=True)


def next_token_loss(model: PreTrainedModel, batch: Tensor) -> Tensor:
    logits = model(batch[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: PreTrainedModel, tokens: Tensor, seq_len: int) -> float:
    """Loss in nats on up to 64 windows spread over ``tokens``, always the same ones."""
    model.eval()
    count = min(64, (tokens.numel() - 1) // seq_len)
    starts = torch.arange(count)[:, None] * ((tokens.numel() - 1) // count)
    windows = tokens[starts + torch.arange(seq_len + 1)].long()
    return sum(next_token_loss(model, part).item() * len(part) for part in windows.split(16)) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a pretrained causal language model; without, a small GPT-2 is trained first")
    parser.add_argument("--data", type=Path, help="a text file or a folder of them")
    parser.add_argument("--mixer", default="hyperglu", choices=["hyperglu", "hypermlp"])
    parser.add_argument("--steps", type=int, default=300, help="steps that train the small GPT-2")
    parser.add_argument("--tune-steps", type=int, default=50, help="steps of fine-tuning after the swap")
    parser.add_argument("--lr", type=float, help="of fine-tuning; 1e-3 for the small model, else 1e-4")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--out", type=Path, help="where to save the model that was swapped with from_attention")
    args = parser.parse_args()

    torch.manual_seed(0)
    corpus = load_corpus(args.data)
    sizes = {"seq_len": args.seq_len, "batch_size": args.batch_size}
    if args.model:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_pretrained(args.model)
        # the first two megabytes are plenty here
        texts = (bytes(part[: 1 << 21].tolist()).decode(errors="replace") for part in (corpus.train, corpus.validation))
        train_tokens, held_out = (torch.tensor(tokenizer(text)["input_ids"]) for text in texts)
    else:
        tokenizer = None
        model = GPT2LMHeadModel(GPT2Config(n_positions=args.seq_len, bos_token_id=0, eos_token_id=0, **SMALL))
        train_tokens, held_out = corpus.train, corpus.validation
        print(f"Training a GPT-2 of {model.num_parameters():,} parameters for {args.steps} steps")
        train(model, train_tokens, args.steps, lr=2e-3, seed=0, **sizes)
    before = evaluate(model, held_out, args.seq_len)
    print(f"Loss on held-out text: {before:.3f} nats a token\n")

    lr = args.lr or (1e-4 if args.model else 1e-3)
    rows = []
    for name, init in (("softmax, left as it is", None), ("swapped, fresh", "fresh"), ("swapped", "from_attention")):
        tuned = copy.deepcopy(model)
        torch.manual_seed(1)
        if init is not None:
            report = swap_attention(tuned, args.mixer, init=init)
            print(report)
            name = f"{name}, from_attention" if init == "from_attention" else name
        after_swap = evaluate(tuned, held_out, args.seq_len)
        train(tuned, train_tokens, args.tune_steps, lr=lr, seed=1, **sizes)
        rows.append((name, after_swap, evaluate(tuned, held_out, args.seq_len), tuned.num_parameters()))

    print(f"\n{'held-out loss':<26}{'after the swap':>16}{f'after {args.tune_steps} steps':>16}{'parameters':>14}")
    for name, first, last, parameters in rows:
        print(f"{name:<26}{first:>16.3f}{last:>16.3f}{parameters:>14,}")

    prompt = "def main(" if tokenizer is None else "The"
    ids = (
        torch.tensor([list(prompt.encode())]) if tokenizer is None else tokenizer(prompt, return_tensors="pt").input_ids
    )
    torch.manual_seed(0)
    longest = min(80, args.seq_len - ids.shape[1])
    written = tuned.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=longest,
        do_sample=True,
        temperature=0.7,
        pad_token_id=0,
    )[0]
    text = bytes(written.tolist()).decode(errors="replace") if tokenizer is None else tokenizer.decode(written)
    print(f"\nThe swapped model goes on from {prompt!r}:\n{text}\n")

    if args.out:
        tuned.save_pretrained(args.out)
        print(f"Saved in {args.out}; open it with hypermlp.integrations.huggingface.from_pretrained({str(args.out)!r})")
    swap_attention(model, args.mixer)
    restore_attention(model)
    print(f"Swapped and restored, the old model's loss is {evaluate(model, held_out, args.seq_len):.3f} again.")


if __name__ == "__main__":
    main()
