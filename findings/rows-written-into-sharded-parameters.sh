#!/usr/bin/env bash
# torch 2.13.0: writes in place into a part of a DTensor, such as FSDP2 makes of every parameter, two processes.
#
# Expected: they change the tensor, as they do in one process, or a refusal, as x[1] = 0 gives.
# Seen: nothing changes, silently, where the part cuts through the dimension that is shared: x[1].zero_() and such write
# into a copy that was gathered for them. A sharded nn.Embedding(padding_idx=...) that is started by its own
# reset_parameters() has no row of zeros for padding. (The project's issue 139735, closed, is about a slice.)
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
cat > "$dir/writes.py" <<'PY'
import os
import sys
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

WRITES = {  # and the dimension whose sharing loses them, or both
    "x.mul_(2)": (lambda x: x.mul_(2), ()),
    "x.t().mul_(2)": (lambda x: x.t().mul_(2), ()),
    "x.view(-1).mul_(2)": (lambda x: x.view(-1).mul_(2), ()),
    "x[1].zero_()": (lambda x: x[1].zero_(), (0,)),
    "init.ones_(x[1])": (lambda x: nn.init.ones_(x[1]), (0,)),
    "x[:2].mul_(3)": (lambda x: x[:2].mul_(3), (0,)),
    "x.chunk(2)[1].zero_()": (lambda x: x.chunk(2)[1].zero_(), (0,)),
    "x[:, 1:3].mul_(2)": (lambda x: x[:, 1:3].mul_(2), (1,)),
    "x.diagonal().zero_()": (lambda x: x.diagonal().zero_(), (0, 1)),
}


def main(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for name, (write, loses) in WRITES.items():
        for dim in (0, 1):
            start = torch.arange(1.0, 33.0).view(4, 8)
            right, found = start.clone(), distribute_tensor(start.clone(), mesh, [Shard(dim)])
            write(right)
            write(found)
            found = found.full_tensor()
            if not rank:
                print(f"{name}, dimension {dim} shared: {'unchanged' if torch.equal(found, start) else 'written'}")
            assert torch.equal(found, start if dim in loses else right)
    with torch.device("meta"):
        table = nn.Embedding(6, 4, padding_idx=1)
    fully_shard(table, mesh=mesh)
    table.to_empty(device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that random numbers on a CPU may be the same in all processes
        table.reset_parameters()
    row, alone = table.weight.full_tensor()[1].tolist(), nn.Embedding(6, 4, padding_idx=1).weight[1].tolist()
    if not rank:
        print(f"the row of padding: {alone} in one process, {row} with FSDP2")
    assert not any(alone) and all(row)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # threads of the group sometimes abort a process that takes itself apart


if __name__ == "__main__":
    torch.multiprocessing.spawn(main, (sys.argv[1],), nprocs=2)
PY
OMP_NUM_THREADS=1 "$dir/bin/python" "$dir/writes.py" "$dir"
