"""nanoGPT and minGPT, whose ``model.py`` people copy: attention called as ``attn(x)``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hypermlp.integrations.arguments import refuse_unknown
from hypermlp.integrations.fx import one_node
from hypermlp.integrations.host import Host, Projections
from hypermlp.integrations.registry import SizedAdapter
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


class NanoGPTAdapter(SizedAdapter):
    """``transformer.h.{i}.attn``."""

    wrapper = NanoGPTAttention

    @staticmethod
    def tokens(around: Any) -> int | None:
        size: int | None = getattr(getattr(around, "config", around), "block_size", None)
        return size

    def skip(self, module: nn.Module) -> str | None:
        lacks = [name for name in ("c_attn", "c_proj", "n_head", "n_embd") if not hasattr(module, name)]
        return f"it is not built as nanoGPT's: no {', '.join(lacks)}" if lacks else None

    def describe(self, module: Any) -> Host:
        dropout = getattr(module, "resid_dropout", None)
        return Host(
            hidden_size=module.n_embd,
            num_heads=module.n_head,
            max_length=self.length,
            output_dropout=0.0 if dropout is None else dropout.p,
            projections=lambda: Projections.of_joint(
                module.c_attn.weight, module.c_attn.bias, module.c_proj, module.n_head,
                (module.n_embd // module.n_head) ** -0.5,
            ),
        )  # fmt: skip


ADAPTER = NanoGPTAdapter()
