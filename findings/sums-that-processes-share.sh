#!/usr/bin/env bash
# torch 2.13.0: functions of sharded DTensors whose results pass through sums that two processes hold parts of.
#
# Expected: what one process has, or a refusal, as relu_() of such a sum gives.
# Seen: other numbers, silently. any() counts the processes once it becomes a number: any().float() is 2 where both
# have one. fill_(1) of a sum is 2. cosine_embedding_loss of vectors whose entries are shared is another loss.
# (torch 2.15.0 has any() right.)
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
cat > "$dir/sums.py" <<'PY'
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

CASES = {
    "(x > 0).any()": lambda x, y, sign: (x > 0).any(),
    "(x > -9).all().float()": lambda x, y, sign: (x > -9).all().float(),
    "x.amax().float()": lambda x, y, sign: x.amax().float(),
    "cosine_similarity": lambda x, y, sign: F.cosine_similarity(x, y),
    "(x > 0).any().float()": lambda x, y, sign: (x > 0).any().float(),
    "(x > 0).any(1) * 0.5": lambda x, y, sign: (x > 0).any(1) * 0.5,
    "x.sum(1).fill_(1)": lambda x, y, sign: x.sum(1).fill_(1),
    "cosine_embedding_loss": lambda x, y, sign: F.cosine_embedding_loss(x, y, sign),
}


def main(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    x, y = torch.randn(2, 4, 8, dtype=torch.float64)
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    shared = [distribute_tensor(value, mesh, [Shard(1)]) for value in (x, y)]
    shared.append(distribute_tensor(sign, mesh, [Replicate()]))
    for position, (name, function) in enumerate(CASES.items()):
        right, found = function(x, y, sign).double(), function(*shared).full_tensor().double()
        error = ((found - right).norm() / right.norm()).item()
        if not rank:
            print(f"{name}: {[round(v, 3) for v in found.flatten().tolist()]}, off by {error:.2g} (relative)")
        assert (error < 1e-6) if position < 4 else (error > 0.1)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # threads of the group sometimes abort a process that takes itself apart


if __name__ == "__main__":
    torch.multiprocessing.spawn(main, (sys.argv[1],), nprocs=2)
PY
OMP_NUM_THREADS=1 "$dir/bin/python" "$dir/sums.py" "$dir"
