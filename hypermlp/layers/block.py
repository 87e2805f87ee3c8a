"""Pre-norm Transformer block: any attention layer of this library, then SwiGLU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypermlp.cache import HyperCache, Part
from hypermlp.config import HyperConfig
from hypermlp.layers.factory import build_layer
from hypermlp.layers.projection import Projection, start_afresh
from hypermlp.ops.attention import Backend


class SwiGLU(nn.Module):
    """``(silu(x Wg) * (x Wu)) Wd`` (Shazeer, arXiv 2002.05202), no biases.

    Args:
        hidden_size: width of input and output.
        intermediate_size: width inside.
        gain: of the last projection's start.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        gain: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        self.gate_proj = Projection(hidden_size, intermediate_size, **factory)
        self.up_proj = Projection(hidden_size, intermediate_size, **factory)
        self.down_proj = Projection(intermediate_size, hidden_size, gain=gain, **factory)

    def reset_parameters(self) -> None:
        """Every weight ``N(0, 1 / fan_in)``, the last one times ``gain``."""
        for part in self.children():
            start_afresh(part)

    def forward(self, hidden_states: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
        return out


class TransformerBlock(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``, with RMSNorm and SwiGLU.

    Both branches' last projection starts ``sqrt(2 * num_layers)`` smaller than usual: the residual stream sums
    ``2 * num_layers`` branches, and its variance does not grow with depth (Radford et al., GPT-2, section 2.3).

    Args:
        config: the attention layer.
        intermediate_size: width inside the MLP.
        num_layers: blocks in the whole model: the start of the residual branches depends on it.
        norm_eps: of the RMSNorms.
        backend: path of the operator, see :func:`hypermlp.ops.hyper_attention`.
        layer_idx: place in a model, for caches.
        device, dtype: of the parameters.

    Shape:
        ``[B, T, hidden_size]`` to ``[B, T, hidden_size]``.
    """

    def __init__(
        self,
        config: HyperConfig,
        intermediate_size: int,
        *,
        num_layers: int = 1,
        norm_eps: float = 1e-6,
        backend: Backend = "auto",
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_layers, gain = num_layers, (2 * num_layers) ** -0.5
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=norm_eps, **factory)
        self.attention = build_layer(config, backend=backend, layer_idx=layer_idx, **factory)
        self.attention.o_proj.gain = gain
        self.attention.o_proj.reset_parameters()
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=norm_eps, **factory)
        self.mlp = SwiGLU(config.hidden_size, intermediate_size, gain=gain, **factory)

    def reset_parameters(self) -> None:
        """Start every parameter afresh; each part says its own start."""
        for part in self.children():
            start_afresh(part)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **self.attention.with_part(args, kwargs))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        cache: HyperCache | Part | None = None,
    ) -> Tensor:
        """One block over ``[B, T, hidden_size]``; mask, ``cu_seqlens`` and cache as in the attention layer."""
        x = self.attention_norm(hidden_states)
        hidden_states = hidden_states + self.attention(x, attention_mask, cu_seqlens=cu_seqlens, cache=cache)
        out: Tensor = hidden_states + self.mlp(self.mlp_norm(hidden_states))
        return out
