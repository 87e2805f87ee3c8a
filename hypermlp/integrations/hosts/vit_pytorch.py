"""vit-pytorch: attention that holds the norm before it and the dropout after it, called as ``attention(x)``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hypermlp.integrations.arguments import refuse_unknown
from hypermlp.integrations.fx import one_node
from hypermlp.integrations.host import Host, Projection, Projections, nearest
from hypermlp.integrations.positions import fit_grid
from hypermlp.integrations.registry import Adapter
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


class VitPytorchAdapter(Adapter):
    """``transformer.layers.{i}.0`` of ``ViT`` and ``SimpleViT``."""

    def __init__(self, tokens: int | None = None) -> None:
        self.tokens = tokens

    def at(self, model: nn.Module, name: str) -> Adapter:
        return VitPytorchAdapter(nearest(model, name, _tokens))

    def describe(self, module: Any) -> Host:
        last = _last(module)
        return Host(
            hidden_size=module.to_qkv.in_features,
            num_heads=module.heads,
            causal=False,
            max_length=self.tokens,
            output_projection=last is not None,
            output_dropout=next((part.p for part in module.to_out.modules() if isinstance(part, nn.Dropout)), 0.0),
            projections=lambda: _projections(module, last),
        )

    def wrap(self, layer: AttentionLayer, module: Any, host: Host) -> nn.Module:
        return NormedAttention(module.norm, layer, host.output_dropout)


def _tokens(model: Any) -> int | None:
    """Rows of the positions that a model adds, which are a parameter or, of sinusoids, a tensor."""
    positions = getattr(model, "pos_embedding", None)
    return positions.shape[-2] if isinstance(positions, Tensor) else None


def _last(module: Any) -> nn.Linear | None:
    """The output projection; None where one head of full width has none."""
    return next((part for part in module.to_out.modules() if isinstance(part, nn.Linear)), None)


def _projections(module: Any, last: nn.Linear | None) -> Projections:
    joint = Projection.of_joint(module.to_qkv.weight, module.to_qkv.bias, module.heads)
    return Projections(*joint, None if last is None else (last.weight, last.bias), module.scale)


ADAPTER = VitPytorchAdapter()
