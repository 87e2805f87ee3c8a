#!/usr/bin/env bash
# torchtitan 0.2.2, torch 2.13.0, triton 3.7.1: data parallelism without shards (apply_ddp of its llama3, data_parallel_replicate_degree
# alone) with the loss as its trainer has it: a sum over a process's tokens, divided by the tokens of all processes.
#
# Expected: the gradient of one process that has the whole batch. The trainer's loss makes that a plain sum over processes,
# and for FSDP2 the same file switches the division of gradients off.
# Seen: replicas average gradients by PyTorch's default, on top of the division by all tokens: with W of them the
# gradient is 1/W of the right one, and so is the gradient norm that is logged and clipped by.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 torchtitan==0.2.2 triton==3.7.1 numpy==2.3.5
cat > "$dir/replicas.py" <<'PY'
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torchtitan.components.loss import cross_entropy_loss
from torchtitan.models.llama3.infra.parallelize import apply_ddp

WORLD = 2


def main(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    torch.manual_seed(0)
    one, many = torch.nn.Linear(8, 5), torch.nn.Linear(8, 5)
    many.load_state_dict(one.state_dict())
    x, y = torch.randn(4, 1, 8), torch.randint(5, (4, 1))
    tokens = y.numel()  # of all processes, as Trainer.train_step counts them
    (cross_entropy_loss(one(x), y) / tokens).backward()
    apply_ddp(many, init_device_mesh("cpu", (WORLD,)), enable_compile=False)
    own = slice(2 * rank, 2 * rank + 2)
    (cross_entropy_loss(many(x[own]), y[own]) / tokens).backward()
    if not rank:
        ratio = float(many.weight.grad.norm() / one.weight.grad.norm())
        print(f"gradient norm of {WORLD} replicas over that of one process: {ratio:.6f}")
        assert abs(ratio - 1 / WORLD) < 1e-5
        assert torch.allclose(many.weight.grad * WORLD, one.weight.grad, atol=1e-6)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(main, (sys.argv[1],), nprocs=WORLD)
PY
"$dir/bin/python" "$dir/replicas.py" "$dir"
