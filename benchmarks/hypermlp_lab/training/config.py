"""How a model is trained."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Precision = Literal["float32", "bfloat16"]
_TOO_LARGE = 2**63


@dataclass(frozen=True)
class TrainingConfig:
    """One training run. Frozen; every field is checked.

    Args:
        steps: optimiser steps.
        batch_size: windows in a step.
        seq_len: tokens of a window.
        lr: highest learning rate, reached after ``warmup_steps``; a cosine then leads to a tenth.
        warmup_steps: None: a tenth of ``steps``, 100 at most.
        weight_decay: of AdamW, on the matrices of linear layers alone.
        table_lr: learning rate of the tables of sequence mixing, as a multiple of ``lr``.
        grad_clip: largest norm of the gradient.
        eval_every: steps between evaluations. None: a tenth of ``steps``.
        eval_windows: validation windows of an evaluation.
        checkpoint_every: steps between checkpoints.
        seed: of the data order.
        dtype: ``"float32"``, or ``"bfloat16"`` for autocast over float32 weights.
    """

    # None stands for a default that is resolved below, so readers never meet it
    steps: int
    batch_size: int = 16
    seq_len: int = 256
    lr: float = 8e-3
    warmup_steps: int = None  # type: ignore[assignment]
    weight_decay: float = 0.1
    table_lr: float = 1.0
    grad_clip: float = 1.0
    eval_every: int = None  # type: ignore[assignment]
    eval_windows: int = 128
    checkpoint_every: int = 100
    seed: int = 0
    dtype: Precision = "float32"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "seq_len", "eval_windows", "checkpoint_every"):
            self._check_integer(name, 1)
        if self.warmup_steps is None:
            object.__setattr__(self, "warmup_steps", min(100, self.steps // 10))
        if self.eval_every is None:
            object.__setattr__(self, "eval_every", max(1, self.steps // 10))
        self._check_integer("warmup_steps", 0)
        self._check_integer("eval_every", 1)
        self._check_integer("seed", 0)
        for name in ("lr", "grad_clip", "weight_decay", "table_lr"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not (0 <= value < math.inf) or (value == 0 and name != "weight_decay"):
                least = ">= 0" if name == "weight_decay" else "positive"
                raise ValueError(f"{name} must be {least} and finite, got {value!r}")
        if self.dtype not in get_args(Precision):
            raise ValueError(f"dtype must be one of {get_args(Precision)}, got {self.dtype!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values that ``TrainingConfig(**...)`` takes back."""
        return asdict(self)

    def _check_integer(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < _TOO_LARGE:
            raise ValueError(f"{name} must be an integer from {least} to 2**63 - 1, got {value!r}")
