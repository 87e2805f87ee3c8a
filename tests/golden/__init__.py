"""Golden cases: inputs, weights, outputs and gradients recorded from the authors' implementation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hypermlp import HyperConfig, HyperMLP
from hypermlp.integrations.official import convert_official, from_official, official_config

FOLDER = Path(__file__).parent

# what the authors' code holds against itself, relative to the largest entry
TOLERANCE_Y = {torch.float64: 1e-10, torch.float32: 5e-6}
TOLERANCE_GRAD = {torch.float64: 1e-10, torch.float32: 5e-5}


@dataclass(frozen=True)
class Golden:
    """One case. ``grads`` are float64 and under the authors' names; the loss is ``(y * w).sum()``."""

    name: str
    config: dict[str, Any]
    params: dict[str, Tensor]
    grads: dict[str, Tensor]
    x: Tensor
    w: Tensor
    y: dict[torch.dtype, Tensor]
    grad_x: Tensor
    attention_mask: Tensor | None

    def layer(self, dtype: torch.dtype = torch.float64, **options: Any) -> HyperMLP:
        """Ours with their weights."""
        return from_official(self.config, {name: p.to(dtype) for name, p in self.params.items()}, **options)

    def hyper_config(self) -> HyperConfig:
        return official_config(self.config)

    def our_grads(self) -> dict[str, Tensor]:
        """Their gradients under our names and in our layout."""
        return convert_official(self.hyper_config(), self.grads)


def names(prefix: str = "") -> list[str]:
    return sorted(path.stem for path in FOLDER.glob(f"{prefix}*.safetensors"))


@cache
def load(name: str) -> Golden:
    """The case whose file starts with ``name``, such as ``"s01"``."""
    (path,) = FOLDER.glob(f"{name}*.safetensors")
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a mapping

    def group(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}

    grads = group("grad.")
    mask = tensors.get("attention_mask")
    return Golden(
        name=path.stem,
        config=config,
        params=group("param."),
        grads={key: grad for key, grad in grads.items() if key != "x"},
        x=tensors["x"],
        w=tensors["w"],
        y={torch.float64: tensors["y.f64"], torch.float32: tensors["y.f32"]},
        grad_x=grads["x"],
        attention_mask=None if mask is None else mask != 0,
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest entry of ``expected``."""
    difference = (actual.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max().clamp_min(1e-300))
