"""AdamW with decay on matrices alone, and the learning rate over time."""

from __future__ import annotations

import math

import torch
from torch import nn

from hypermlp import parameter_groups
from hypermlp_lab.training.config import TrainingConfig

_BETAS = (0.9, 0.95)
# share of the highest learning rate that the cosine ends at
_FINAL_SHARE = 0.1


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW whose weight decay acts on the weights of linear layers only, see :func:`hypermlp.parameter_groups`."""
    matrices, heads, others = parameter_groups(model, weight_decay=config.weight_decay)
    decayed = {**matrices, "params": [*matrices["params"], *heads["params"]]}
    groups = [group for group in (decayed, others) if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=_BETAS, fused=True)


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Learning rate of step ``step``, counted from 0: linear warm-up, then a cosine."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    share = _FINAL_SHARE + (1 - _FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * share
