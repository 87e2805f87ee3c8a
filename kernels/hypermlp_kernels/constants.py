"""What a kernel is compiled for, by name: a kernel takes each of these as one ``tl.constexpr``.

Plain fields alone: Triton 3.8 passes on a tuple's fields and nothing else of it. Where a field is part of a shape,
the function names it first (``BM: tl.constexpr = C.BM``), since a tuple in a kernel takes no plain numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl


class Constants(NamedTuple):
    """Of a call and its tile: switches, number formats, sizes.

    Attributes:
        GLU: two score maps a head.
        BY_LAG: columns are lags, else positions.
        NORM: maps are divided by their rows' norms.
        CAUSAL: keys after the query are hidden.
        HAS_BLOCKS: programs take their rows from a block table (``schedule.py``).
        HOLES: keys may be masked anywhere.
        PACKED: both score maps travel as one word.
        ASM: NVIDIA's assembly inline.
        CHAINED: products of single warps, each with rows of its own: see ``scores.scores_of``.
        ACC: dtype of accumulators.
        MIX: dtype of low-rank products' operands.
        PRECISION: of products of float32.
        K: width of a score map, ``BK`` padded.
        BM: query rows of a tile, in ``NG`` groups that each have a lag window of their own.
        BN: keys of a tile.
        STAGES: tiles on their way from memory.
    """

    GLU: bool
    BY_LAG: bool
    CAUSAL: bool
    NORM: bool
    HAS_BLOCKS: bool
    HOLES: bool
    PACKED: bool
    ASM: bool
    CHAINED: bool
    ACC: tl.dtype
    MIX: tl.dtype
    PRECISION: str
    K: int
    BK: int
    BM: int
    BN: int
    NG: int
    STAGES: int


class MixConstants(NamedTuple):
    """Of a mixing: ``R`` is its rank, 0 for no low-rank term, ``BR`` padded; ``SCALE`` see ``call.scale_mode``."""

    R: int
    BR: int
    SCALE: str
    GATED: bool
