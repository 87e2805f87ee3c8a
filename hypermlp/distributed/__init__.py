"""Attention layers over several processes: their heads, or a sequence's tokens.

PyTorch's own FSDP2, DDP and distributed checkpoints are for all else (``docs/scale.md``).
"""

from hypermlp.distributed.heads import shard_heads
from hypermlp.distributed.placement import along_lags
from hypermlp.distributed.sequence import sequence_part, sequence_whole, shard_sequence
from hypermlp.distributed.state import clip_grad_norm_, full_state_dict

__all__ = [
    "along_lags",
    "clip_grad_norm_",
    "full_state_dict",
    "sequence_part",
    "sequence_whole",
    "shard_heads",
    "shard_sequence",
]
