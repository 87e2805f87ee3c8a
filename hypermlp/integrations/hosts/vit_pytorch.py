"""vit-pytorch: attention that holds the norm before it and the dropout after it, called as ``attention(x)``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hypermlp.integrations.arguments import refuse_unknown
from hypermlp.integrations.fx import one_node
from hypermlp.integrations.host import Host, Projections
from hypermlp.integrations.positions import fit_grid
from hypermlp.integrations.registry import SizedAdapter
from hypermlp.layers import AttentionLayer


class NormedAttention(nn.Module):
    """The host's own norm, a hyper layer, dropout.

    Args:
        norm: of the host, which stays.
        mixer: the layer that computes.
        dropout: probability of dropout after the output projection.
    """

    def __init__(self, norm: nn.Module, mixer: AttentionLayer, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.mixer, self.dropout = norm, mixer, nn.Dropout(dropout)
        fit_grid(mixer)

    @one_node
    def forward(self, x: Tensor, **unknown: Any) -> Tensor:
        """``[B, N, dim]`` to the same."""
        refuse_unknown(unknown, {}, type(self).__name__, "vit_pytorch")
        out: Tensor = self.dropout(self.mixer(self.norm(x)))
        return out


class VitPytorchAdapter(SizedAdapter):
    """``transformer.layers.{i}.0`` of ``ViT`` and ``SimpleViT``."""

    @staticmethod
    def tokens(around: Any) -> int | None:
        """Rows of the positions that a model adds, which are a parameter or, of sinusoids, a tensor."""
        positions = getattr(around, "pos_embedding", None)
        return positions.shape[-2] if isinstance(positions, Tensor) else None

    def describe(self, module: Any) -> Host:
        # none where there is one head of full width
        last = next((part for part in module.to_out.modules() if isinstance(part, nn.Linear)), None)
        return Host(
            hidden_size=module.to_qkv.in_features,
            num_heads=module.heads,
            causal=False,
            max_length=self.length,
            output_projection=last is not None,
            output_dropout=next((part.p for part in module.to_out.modules() if isinstance(part, nn.Dropout)), 0.0),
            projections=lambda: Projections.of_joint(
                module.to_qkv.weight, module.to_qkv.bias, last, module.heads, module.scale
            ),
        )

    def wrap(self, layer: AttentionLayer, module: Any, host: Host) -> nn.Module:
        return NormedAttention(module.norm, layer, host.output_dropout)


ADAPTER = VitPytorchAdapter()
