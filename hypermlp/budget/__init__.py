"""Parameters, FLOPs, kept memory and traffic of a described layer, and widths that make two of them equal in size.

Nothing is built: counts are closed forms of a :class:`~hypermlp.HyperConfig`. A comparison needs
them: at width 128 and 128 lags the default HyperGLU has 1.53 times softmax attention's
parameters (the sequence mixing's tables and cores do not shrink with the width).
"""

from hypermlp.budget.counts import (
    Count,
    count_backward_flops,
    count_block_backward_flops,
    count_block_flops,
    count_block_parameters,
    count_flops,
    count_parameters,
)
from hypermlp.budget.kept import Kept, count_block_kept, count_kept, count_norm_kept
from hypermlp.budget.matching import Match, match_intermediate_size, match_parameters
from hypermlp.budget.traffic import count_heads_bytes, count_sequence_bytes, ring_bytes

__all__ = [
    "Count",
    "Kept",
    "Match",
    "count_backward_flops",
    "count_block_backward_flops",
    "count_block_flops",
    "count_block_kept",
    "count_block_parameters",
    "count_flops",
    "count_heads_bytes",
    "count_kept",
    "count_norm_kept",
    "count_parameters",
    "count_sequence_bytes",
    "match_intermediate_size",
    "match_parameters",
    "ring_bytes",
]
