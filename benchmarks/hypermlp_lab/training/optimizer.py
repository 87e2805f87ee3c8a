"""AdamW with decay on matrices alone, and the learning rate over time."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hypermlp import parameter_groups
from hypermlp_lab.training.config import TrainingConfig

_BETAS = (0.9, 0.95)
# share of the highest learning rate that the cosine ends at
_FINAL_SHARE = 0.1


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW whose weight decay acts on the weights of linear layers only, see :func:`hypermlp.parameter_groups`.

    The groups have an ``lr_scale``, which :func:`set_learning_rate` heeds.
    """
    groups = parameter_groups(model, weight_decay=config.weight_decay)._asdict()
    scales = {"tables": config.table_lr}
    kept = [group | {"lr_scale": scales.get(name, 1.0)} for name, group in groups.items() if group["params"]]
    return torch.optim.AdamW(kept, lr=config.lr, betas=_BETAS, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group ``lr``, times its ``lr_scale``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def descend(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, lr: float, grad_clip: float, step: int
) -> float:
    """Step number ``step``, down ``loss``, whose value it returns; the gradient's norm is ``grad_clip`` at most.

    Raises:
        FloatingPointError: the loss or the gradient is not finite. Weights and optimizer are as they were.
    """
    set_learning_rate(optimizer, lr)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    found = {"loss": loss.item(), "gradient's norm": norm.item()}
    for what, value in found.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"in step {step} the {what} is {value}: try a smaller lr")
    optimizer.step()
    return found["loss"]


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Learning rate of step ``step``, counted from 0: linear warm-up, then a cosine."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    share = _FINAL_SHARE + (1 - _FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * share
