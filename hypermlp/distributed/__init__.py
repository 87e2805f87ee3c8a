"""Attention layers over several processes.

PyTorch's own FSDP2, DDP and distributed checkpoints are for all else.
"""

from hypermlp.distributed.heads import shard_heads
from hypermlp.distributed.state import clip_grad_norm_, full_state_dict

__all__ = [
    "clip_grad_norm_",
    "full_state_dict",
    "shard_heads",
]
