"""Sequence mixing: learned tables along the sequence with an input-conditioned core."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hypermlp.config import MixConfig
from hypermlp.ops import SequenceMix

# standard deviation of the tables, from the paper's implementation
_TABLE_STD = 0.02


class LagMixing(nn.Module):
    """``R(x_t) = Diag(1 + diag) + down Diag(phi(x_t W + b)) up^T`` for several heads.

    Tables are indexed by lag, lag 0 (the token itself) first: ``diag`` ``[heads, max_lag]``,
    ``down`` and ``up`` ``[heads, max_lag, rank]``. In the position layout row 0 is position 0.
    The cores are a layer's :class:`~hypermlp.layers.feature_mixing.Gates`.

    Args:
        num_heads: maps that it mixes.
        max_lag: rows of the tables.
        mix: which parts it has.
        device, dtype: of the parameters.
    """

    diag: nn.Parameter | None
    down: nn.Parameter | None
    up: nn.Parameter | None

    def __init__(
        self,
        num_heads: int,
        max_lag: int,
        mix: MixConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.max_lag, self.mix = num_heads, max_lag, mix

        def table(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_heads, max_lag, *shape, device=device, dtype=dtype))

        self.diag = table() if mix.diag else None
        self.down = table(mix.rank) if mix.rank else None
        self.up = table(mix.rank) if mix.rank else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Diagonal zero, tables N(0, 0.02^2): the authors' start, near the identity."""
        if self.diag is not None:
            nn.init.zeros_(self.diag)
        for table in (self.down, self.up):
            if table is not None:
                nn.init.normal_(table, std=_TABLE_STD)

    def forward(self, core: Tensor) -> SequenceMix:
        """The mixing of some tokens, as the operator takes it.

        Args:
            core: the tokens' cores, ``[B, T, heads * rank]`` or ``[B, heads * rank]``; of no width where ``rank`` is 0.
        """
        mix, held = self.mix, self._parameters
        cores = core.view(*core.shape[:-1], self.num_heads, mix.rank) if mix.rank else None
        try:  # three attributes of a module cost a step as much as a product
            return SequenceMix(held["diag"], held["down"], held["up"], cores, mix.identity)
        except KeyError:  # some are left out, or something computes them: pruning, a parametrisation
            return SequenceMix(self.diag, self.down, self.up, cores, mix.identity)

    def extra_repr(self) -> str:
        mix = self.mix
        return (
            f"heads={self.num_heads}, max_lag={self.max_lag}, rank={mix.rank}, diag={mix.diag}, identity={mix.identity}"
        )
