"""nanoGPT and minGPT, whose ``model.py`` people copy: attention called as ``attn(x)``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hypermlp.integrations.arguments import refuse_unknown
from hypermlp.integrations.fx import one_node
from hypermlp.integrations.host import Host, Projection, Projections, nearest
from hypermlp.integrations.registry import Adapter
from hypermlp.layers import AttentionLayer


class NanoGPTAttention(nn.Module):
    """A hyper layer and the dropout after it.

    It has no attribute ``bias``: ``GPT.crop_block_size`` takes one for a mask and cuts it. The layer
    needs no cutting, a shorter block uses the first rows of its tables.

    Args:
        mixer: the layer that computes.
        dropout: probability of dropout after the output projection.
    """

    def __init__(self, mixer: AttentionLayer, dropout: float = 0.0) -> None:
        super().__init__()
        self.mixer = mixer
        self.resid_dropout = nn.Dropout(dropout)

    @one_node
    def forward(self, x: Tensor, **unknown: Any) -> Tensor:
        """``[B, T, n_embd]`` to the same."""
        refuse_unknown(unknown, {}, type(self).__name__, "nanoGPT")
        out: Tensor = self.resid_dropout(self.mixer(x))
        return out


class NanoGPTAdapter(Adapter):
    """``transformer.h.{i}.attn``."""

    def __init__(self, block_size: int | None = None) -> None:
        self.block_size = block_size

    def at(self, model: nn.Module, name: str) -> Adapter:
        block_size = nearest(model, name, lambda host: getattr(getattr(host, "config", host), "block_size", None))
        return self if block_size is None else NanoGPTAdapter(block_size)

    def skip(self, module: nn.Module) -> str | None:
        lacks = [name for name in ("c_attn", "c_proj", "n_head", "n_embd") if not hasattr(module, name)]
        return f"it is not built as nanoGPT's: no {', '.join(lacks)}" if lacks else None

    def describe(self, module: Any) -> Host:
        dropout = getattr(module, "resid_dropout", None)
        return Host(
            hidden_size=module.n_embd,
            num_heads=module.n_head,
            max_length=self.block_size,
            output_dropout=0.0 if dropout is None else dropout.p,
            projections=lambda: _projections(module),
        )

    def wrap(self, layer: AttentionLayer, module: nn.Module, host: Host) -> nn.Module:
        return NanoGPTAttention(layer, host.output_dropout)


def _projections(module: nn.Module) -> Projections:
    attention: Any = module
    joint = Projection.of_joint(attention.c_attn.weight, attention.c_attn.bias, attention.n_head)
    output = (attention.c_proj.weight, attention.c_proj.bias)
    return Projections(*joint, output, (attention.n_embd // attention.n_head) ** -0.5)


ADAPTER = NanoGPTAdapter()
