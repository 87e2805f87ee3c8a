"""HyperMLP and HyperGLU: attention heads read as two-layer MLPs whose weights come from the context."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from hypermlp.config import MixConfig, Mixer
from hypermlp.layers.feature_mixing import Gates
from hypermlp.layers.operator_layer import OperatorLayer
from hypermlp.layers.sequence_mixing import LagMixing
from hypermlp.ops import SequenceMix


class HyperMLP(OperatorLayer):
    """HyperMLP attention (Lu & Yang, arXiv 2602.12601): ReLU selection, normalised by its L2 norm.

    A drop-in replacement for causal self-attention. The equations stand in
    ``docs/mathematics.md``; every switch of the paper's ablations is a keyword of the constructor.

    Shape:
        ``[B, T, hidden_size]`` to ``[B, T, hidden_size]``.

    Example:
        >>> layer = HyperMLP(256, max_lag=512)
        >>> layer(torch.randn(2, 100, 256)).shape
        torch.Size([2, 100, 256])
    """

    mixer: ClassVar[Mixer] = "hypermlp"

    def _add_parts(self, factory: dict[str, Any]) -> None:
        config = self.config
        self.routing_mix = self._mixing(config.routing_mix, config.num_maps * config.num_heads, factory)
        self.readout_mix = self._mixing(config.readout_mix, config.num_heads, factory)

    def _mixing(self, mix: MixConfig | bool, heads: int, factory: dict[str, Any]) -> LagMixing | None:
        max_lag = self.config.max_lag
        return LagMixing(heads, max_lag, mix, **factory) if isinstance(mix, MixConfig) and max_lag else None

    def mixes(self, q: Tensor, gates: Gates) -> tuple[SequenceMix, SequenceMix]:
        routing, readout = self.routing_mix, self.readout_mix
        return (
            SequenceMix() if routing is None else routing(_no_core(q) if gates.routing is None else gates.routing),
            SequenceMix() if readout is None else readout(_no_core(q) if gates.readout is None else gates.readout),
        )


def _no_core(q: Tensor) -> Tensor:
    """The core of a mixing without a low-rank term: tools by hooks want a tensor with a batch, not None."""
    return q.new_empty(*q.shape[:-1], 0)


class HyperGLU(HyperMLP):
    """HyperGLU attention: like :class:`HyperMLP`, with a second score map that scales what is selected.

    ``softplus(scale map) * relu(gate map)`` in place of ``relu``; ``qk_dim`` is shared out over both
    maps. Keywords and shapes are those of :class:`HyperMLP`.

    Example:
        >>> layer = HyperGLU(256, max_lag=512)
        >>> layer(torch.randn(2, 100, 256)).shape
        torch.Size([2, 100, 256])
    """

    mixer: ClassVar[Mixer] = "hyperglu"
