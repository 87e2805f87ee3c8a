"""Parameters and FLOPs of a described layer, and widths that make two of them equal in size.

Nothing is built: counts are closed forms of a :class:`~hypermlp.HyperConfig`. A comparison needs
them: at width 128 and 128 lags the default HyperGLU has 1.53 times softmax attention's
parameters (the sequence mixing's tables and cores do not shrink with the width).
"""

from hypermlp.budget.counts import Count, count_block_flops, count_block_parameters, count_flops, count_parameters
from hypermlp.budget.matching import Match, match_intermediate_size, match_parameters

__all__ = [
    "Count",
    "Match",
    "count_block_flops",
    "count_block_parameters",
    "count_flops",
    "count_parameters",
    "match_intermediate_size",
    "match_parameters",
]
