"""HyperMLP and HyperGLU: attention heads read as two-layer MLPs whose weights come from the context."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hypermlp.config import ConvInit, GateActivation, HyperConfig, Layout, MixConfig, Mixer
from hypermlp.layers.feature_mixing import Gates
from hypermlp.layers.operator_layer import OperatorLayer
from hypermlp.layers.sequence_mixing import LagMixing
from hypermlp.ops import SequenceMix
from hypermlp.ops.attention import Backend


class HyperMLP(OperatorLayer):
    """HyperMLP attention (Lu & Yang, arXiv 2602.12601): ReLU selection, normalised by its L2 norm.

    A drop-in replacement for causal self-attention. The equations stand in
    ``docs/mathematics.md``; every switch of the paper's ablations is an argument.

    Args:
        hidden_size: width ``D`` of the model.
        num_heads: heads; the paper uses 2.
        qk_dim: total score width, ``hidden_size / 4`` by default.
        v_dim: total value width, ``hidden_size`` by default.
        mix_rank: rank of both sequence mixings, 0 for none.
        max_lag: lags the tables know. A longer sequence is, exactly, a window over the last
            ``max_lag`` tokens.
        conv_size: taps of the causal convolutions on key and value inputs, 0 for none.
        causal: hide later tokens. If not, tables are indexed by position and a sequence may not
            be longer than ``max_lag``.
        layout: ``"lag"`` or ``"position"``; None: by lag if causal.
        routing_mix: first sequence mixing: True, False, or a :class:`~hypermlp.MixConfig`.
        readout_mix: second sequence mixing, likewise.
        q_gate: multiply queries by an input-conditioned gate.
        output_gate: multiply the heads' output by one.
        gate_activation: ``"sigmoid"`` or ``"identity"``, for these gates and the mixings' cores.
        norm: divide by the L2 norm of the (gate) map's row.
        eps: smallest value of that norm.
        rope: rotate queries and keys; the paper finds no gain from it here.
        rope_theta: base of its frequencies.
        bias: biases in the four projections.
        conv_init: ``"identity"``, or ``"paper"`` for the authors' start.
        backend: path of the operator, see :func:`hypermlp.ops.hyper_attention`; ``"triton"`` takes the fused
            kernel for the convolutions too.
        layer_idx: place in a model, for caches.
        device, dtype: of the parameters.

    Shape:
        ``[B, T, hidden_size]`` to ``[B, T, hidden_size]``.

    Example:
        >>> layer = HyperMLP(256, max_lag=512)
        >>> layer(torch.randn(2, 100, 256)).shape
        torch.Size([2, 100, 256])
    """

    mixer: Mixer = "hypermlp"

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 2,
        *,
        qk_dim: int | None = None,
        v_dim: int | None = None,
        mix_rank: int = 16,
        max_lag: int = 2048,
        conv_size: int = 4,
        causal: bool = True,
        layout: Layout | None = None,
        routing_mix: bool | MixConfig = True,
        readout_mix: bool | MixConfig = True,
        q_gate: bool = True,
        output_gate: bool = True,
        gate_activation: GateActivation = "sigmoid",
        norm: bool = True,
        eps: float = 1e-12,
        rope: bool = False,
        rope_theta: float = 10000.0,
        bias: bool = False,
        conv_init: ConvInit = "identity",
        backend: Backend = "auto",
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options: dict[str, Any] = {
            "qk_dim": qk_dim, "v_dim": v_dim, "mix_rank": mix_rank, "max_lag": max_lag, "conv_size": conv_size,
            "causal": causal, "layout": layout, "routing_mix": routing_mix, "readout_mix": readout_mix,
            "q_gate": q_gate, "output_gate": output_gate, "gate_activation": gate_activation, "norm": norm,
            "eps": eps, "rope": rope, "rope_theta": rope_theta, "bias": bias, "conv_init": conv_init,
        }  # fmt: skip
        config = HyperConfig(hidden_size, num_heads, self.mixer, **options)
        super().__init__(config, backend=backend, layer_idx=layer_idx, device=device, dtype=dtype)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.routing_mix = self._mixing(config.routing_mix, config.num_maps * num_heads, factory)
        self.readout_mix = self._mixing(config.readout_mix, num_heads, factory)

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
    maps. Arguments and shapes are those of :class:`HyperMLP`.

    Example:
        >>> layer = HyperGLU(256, max_lag=512)
        >>> layer(torch.randn(2, 100, 256)).shape
        torch.Size([2, 100, 256])
    """

    mixer: Mixer = "hyperglu"
