#!/usr/bin/env bash
# accelerate 1.15.0, torch 2.13.0: an FSDP plugin on two CPU processes.
#
# Expected: the model is sharded (torch's fully_shard works with gloo on CPUs), or an error or warning says that this
# accelerator does not shard there.
# Seen: the plugin is dropped without a word and the model is wrapped in DistributedDataParallel: every process keeps every
# parameter whole, so a rehearsal of a sharded run on a CPU rehearses something else.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 accelerate==1.15.0 numpy==2.3.5
cat > "$dir/shard.py" <<'PY'
import warnings

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=1)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    model = accelerator.prepare(torch.nn.Linear(8, 8))
by_torch = fully_shard(torch.nn.Linear(8, 8), mesh=torch.distributed.init_device_mesh("cpu", (2,)))
sharded = {
    "accelerate": any(isinstance(p, DTensor) for p in model.parameters()),
    "torch": all(isinstance(p, DTensor) for p in by_torch.parameters()),
}
if accelerator.is_main_process:
    about = [str(w.message) for w in said if "shard" in str(w.message).lower() or "fsdp" in str(w.message).lower()]
    print(f"{accelerator.distributed_type}, {type(model).__name__}, sharded: {sharded}, warnings about it: {about}")
    assert sharded == {"accelerate": False, "torch": True} and type(model).__name__ == "DistributedDataParallel"
    assert not about
torch.distributed.destroy_process_group()
PY
OMP_NUM_THREADS=1 "$dir/bin/torchrun" --nproc-per-node 2 "$dir/shard.py"
