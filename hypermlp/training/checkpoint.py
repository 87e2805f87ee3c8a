"""Checkpoints: a folder each, complete or not there at all.

``OUT/checkpoint-00000100/`` holds ``model.safetensors``, ``config.json`` and ``trainer.pt``
(optimizer, data order, progress). It is written under another name and then renamed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from hypermlp.models import LanguageModel, LanguageModelConfig
from hypermlp.ops.attention import Backend

_WEIGHTS, _CONFIG, _TRAINER = "model.safetensors", "config.json", "trainer.pt"
_NAME = re.compile(r"checkpoint-(\d+)")


def save_checkpoint(
    out: Path, step: int, model: LanguageModel, training: dict[str, Any], trainer_state: dict[str, Any]
) -> Path:
    """Write a checkpoint, then delete the older ones.

    Args:
        out: folder of the run.
        step: steps done.
        model: its weights and config are written.
        training: what the run is, as JSON values, to check when it is resumed.
        trainer_state: tensors and plain values.
    """
    from safetensors.torch import save_file

    final, temporary = out / f"checkpoint-{step:08d}", out / f".checkpoint-{step:08d}.tmp"
    for leftover in out.glob(".checkpoint-*.tmp"):
        shutil.rmtree(leftover)
    temporary.mkdir(parents=True)
    weights = {name: weight.detach().cpu().contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, temporary / _WEIGHTS)
    torch.save(trainer_state, temporary / _TRAINER)
    config = {"model": model.config.to_dict(), "training": training}
    (temporary / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    for file in temporary.iterdir():
        _flush(file)
    if final.exists():  # the same step again: a folder cannot be renamed onto a full one
        shutil.rmtree(final)
    os.replace(temporary, final)
    for old in _checkpoints(out):
        if old != final:
            shutil.rmtree(old)
    return final


def latest_checkpoint(out: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint of a run, if there is one."""
    return max(_checkpoints(Path(out)), key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)


def delete_checkpoints(out: Path) -> None:
    """Forget a run."""
    for folder in _checkpoints(out):
        shutil.rmtree(folder)


def load_model(
    path: str | os.PathLike[str], *, backend: Backend = "auto", device: torch.device | str = "cpu"
) -> LanguageModel:
    """The model of a checkpoint, or of the newest one in a run's folder.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = _find(path)
    model = LanguageModel(read_config(folder)[0], backend=backend, device=device)
    load_weights(folder, model)
    return model


def load_weights(folder: Path, model: LanguageModel) -> None:
    """Read a checkpoint's weights into ``model``, which must have its config."""
    from safetensors.torch import load_file

    model.load_state_dict(load_file(folder / _WEIGHTS))


def read_config(folder: Path) -> tuple[LanguageModelConfig, dict[str, Any]]:
    """Model config of a checkpoint, and what its run is."""
    config = json.loads((folder / _CONFIG).read_text())
    return LanguageModelConfig(**config["model"]), config["training"]


def load_trainer_state(folder: Path) -> dict[str, Any]:
    """What :func:`save_checkpoint` was given as ``trainer_state``, on the CPU."""
    state: dict[str, Any] = torch.load(folder / _TRAINER, map_location="cpu", weights_only=True)
    return state


def _find(path: str | os.PathLike[str]) -> Path:
    folder = Path(path) if (Path(path) / _WEIGHTS).is_file() else latest_checkpoint(path)
    if folder is None:
        raise FileNotFoundError(f"no checkpoint in {str(path)!r}: give the --out folder of a training run")
    return folder


def _checkpoints(out: Path) -> list[Path]:
    return [folder for folder in out.iterdir() if _NAME.fullmatch(folder.name)] if out.is_dir() else []


def _flush(file: Path) -> None:
    with file.open("rb+") as handle:
        os.fsync(handle.fileno())
