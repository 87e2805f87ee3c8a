"""Linear maps and embeddings that know their own start, so that any order of starting afresh gives the same."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Projection(nn.Linear):
    """A linear map that starts at ``N(0, gain^2 / fan_in)``, bias zero: a scale that does not depend on the width.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        bias: whether there is one.
        gain: of the start; whoever needs another one sets it here, so that ``reset_parameters`` of this module
            alone, as FSDP and Lightning call it, gives the model's own start.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        gain: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.gain = gain  # before the parameters, which start as they are made
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.gain * self.in_features**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """Token embeddings that start at ``N(0, 1 / embedding_dim)``, and the head that shares their weights.

    A tied head is a call of this module: what reaches weights by hooks and wrappers (offloading, sharding,
    pruning) sees both uses, and a state dict holds the weights once.
    """

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.embedding_dim**-0.5)

    def forward(self, x: Tensor, *, head: bool = False) -> Tensor:
        """``[..., embedding_dim]`` of token ids ``[...]``; as a head, logits ``[..., num_embeddings]`` of vectors."""
        return F.linear(x, self.weight) if head else super().forward(x)


def start_afresh(module: nn.Module) -> None:
    """Start every parameter inside ``module`` afresh, through wrappers that have no start of their own."""
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        reset()
        return
    for child in module.children():
        start_afresh(child)
