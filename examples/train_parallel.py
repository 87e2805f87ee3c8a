"""Train a HyperGLU language model on several GPUs, or CPU processes, with PyTorch's own parts alone.

    torchrun --nproc-per-node 4 examples/train_parallel.py book.txt                        # FSDP2
    torchrun --nproc-per-node 4 examples/train_parallel.py book.txt --sequence 2           # and context parallel
    torchrun --nproc-per-node 4 examples/train_parallel.py book.txt --heads 2 --sequence 2 # and tensor parallel

Bytes are the tokens. A sequence's tokens lie on ``--sequence`` processes, a layer's heads on ``--heads``; what is
left of the processes takes other batch rows. Losses are the same whatever the split.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import hypermlp
from hypermlp import HyperConfig
from hypermlp.distributed import clip_grad_norm_, full_state_dict, sequence_part, shard_heads, shard_sequence
from hypermlp.models import LanguageModel, LanguageModelConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--heads", type=int, default=1, help="processes that share a layer's heads")
    parser.add_argument("--sequence", type=int, default=1, help="processes that share a sequence")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences a step, over all processes")
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--max-lag", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path("model.pt"))
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    if world % (args.heads * args.sequence):
        parser.error(f"{world} processes do not divide by --heads {args.heads} times --sequence {args.sequence}")
    rows = world // (args.heads * args.sequence)
    mesh = init_device_mesh(device, (rows, args.sequence, args.heads), mesh_dim_names=("rows", "sequence", "heads"))
    # FSDP2 shards over all processes but those that share heads
    shards = init_device_mesh(device, (world // args.heads, args.heads), mesh_dim_names=("shards", "heads"))["shards"]

    torch.manual_seed(0)  # the same start on all
    attention = HyperConfig(args.hidden_size, num_heads=4, max_lag=args.max_lag)
    model = LanguageModel(LanguageModelConfig(256, args.hidden_size, args.layers, attention), device=device)
    if args.heads > 1:
        shard_heads(model, mesh["heads"])
    if args.sequence > 1:
        shard_sequence(model, mesh["sequence"])
    for block in model.layers:
        fully_shard(block, mesh=shards)
    fully_shard(model, mesh=shards)  # the rest, in one group: a tied embedding is used twice
    optimizer = torch.optim.AdamW(hypermlp.parameter_groups(model), lr=2e-3)

    text = torch.frombuffer(bytearray(args.text.read_bytes()), dtype=torch.uint8)
    random = torch.Generator().manual_seed(0)  # all draw the same batch, and take their part of it
    for step in range(args.steps):
        starts = torch.randint(len(text) - args.seq_len, (args.batch_size,), generator=random)
        ids = torch.stack([text[start : start + args.seq_len + 1] for start in starts]).long()
        ids = ids.chunk(rows)[mesh.get_local_rank("rows")].to(device)
        inputs, targets = (sequence_part(part, mesh["sequence"]) for part in (ids[:, :-1], ids[:, 1:]))
        loss = model.loss(inputs, targets)  # the mean over own tokens: FSDP2 takes the mean of all
        loss.backward()
        norm = clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == args.steps - 1:
            mean = loss.detach()
            dist.all_reduce(mean)
            if rank == 0:
                print(f"step {step:5d}   loss {mean / world:.5f} nats   gradient norm {norm:.5f}", flush=True)

    state = full_state_dict(model)  # what one process has: it loads into a LanguageModel that is not sharded
    if rank == 0:
        torch.save(state, args.out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
