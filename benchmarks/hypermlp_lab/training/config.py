"""How a model is trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from hypermlp.checks import as_integer, as_number, keep, named_fields

Precision = Literal["float32", "bfloat16"]


@named_fields
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
        keep(self, ("steps", "batch_size", "seq_len", "eval_windows", "checkpoint_every"), as_integer, 1)
        if self.warmup_steps is None:
            object.__setattr__(self, "warmup_steps", min(100, self.steps // 10))
        if self.eval_every is None:
            object.__setattr__(self, "eval_every", max(1, self.steps // 10))
        keep(self, ("warmup_steps", "seed"), as_integer, 0)
        keep(self, ("eval_every",), as_integer, 1)
        keep(self, ("lr", "grad_clip", "table_lr"), as_number)
        keep(self, ("weight_decay",), as_number, True)
        if self.dtype not in get_args(Precision):
            raise ValueError(f"dtype must be one of {get_args(Precision)}, got {self.dtype!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values that ``TrainingConfig(**...)`` takes back."""
        return asdict(self)
