"""Small language models for tools that work by hooks and wrappers, with nothing at its start."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hypermlp import HyperCache, HyperConfig
from hypermlp.models import LanguageModel, LanguageModelConfig

VOCAB = 13


def shake(module: nn.Module) -> None:
    """Diagonals start at zero and taps near the identity: at the start much would go unseen."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def language_model(*, tied: bool = True, mixer: str = "hyperglu", **fields: object) -> LanguageModel:
    """Two blocks in float64; a fourth of the tables' rows is out of reach of short runs."""
    torch.manual_seed(1)
    attention = HyperConfig(8, mixer=mixer, **({"mix_rank": 3, "max_lag": 12} | fields))
    config = LanguageModelConfig(VOCAB, 8, 2, attention, intermediate_size=16, tie_embeddings=tied)
    model = LanguageModel(config, dtype=torch.float64)
    shake(model)
    return model


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def runs(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Logits of a whole run, and of a prompt, a block and single tokens with a cache, growing and static."""
    found = {"whole": model(ids, mask)}
    for name, cache, parts in (
        ("growing", HyperCache(), [4, 3, 1, 1, 1]),
        ("static", HyperCache(static=True, max_length=16), [7, 1, 1, 1]),
    ):
        ids_parts = ids.split(parts, dim=1)
        mask_parts = [None] * len(parts) if mask is None else mask.split(parts, dim=1)
        out = [model(part, now, cache=cache) for part, now in zip(ids_parts, mask_parts, strict=True)]
        found[name] = torch.cat(out, dim=1)
    return found
