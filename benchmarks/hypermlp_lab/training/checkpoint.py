"""Checkpoints: a folder each, complete or not there at all.

``OUT/checkpoint-00000100/`` holds ``model.safetensors``, ``config.json`` (with checksums of the others)
and ``trainer.pt`` (optimizer, data order, progress). It is written under another name, synced to the disk
and then renamed. The newest two stay, so that one is left if the other does not load.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hypermlp.checks import as_integer, check_kind
from hypermlp.models import LanguageModel, LanguageModelConfig
from hypermlp.ops.attention import Backend
from hypermlp_lab.training.files import make_folder, naming, read_json, sync_folder, write_synced
from hypermlp_lab.training.recipe import BYTE_VOCAB, parameter_count

_WEIGHTS, _CONFIG, TRAINER = "model.safetensors", "config.json", "trainer.pt"
_NAME = re.compile(r"checkpoint-(\d+)")
_KEPT = 2


class CheckpointError(ValueError):
    """A checkpoint that does not load; the message names the file and the checkpoint before."""


def save_checkpoint(
    out: str | Path,
    step: int,
    model: LanguageModel,
    training: dict[str, Any],
    trainer_state: dict[str, Any],
    *,
    after: Path | None = None,
) -> Path:
    """Write a checkpoint, then delete all but the newest two. The caller holds the folder's lock.

    Args:
        out: folder of the run.
        step: steps done.
        model: its weights and config are written; of a compiled one those of the model that was compiled.
        training: what the run is, as JSON values, to check when it is resumed.
        trainer_state: tensors and plain values.
        after: the checkpoint that this run wrote or resumed last, None if there is none.

    Raises:
        FloatingPointError: a weight, or a number of ``trainer_state``, is not finite.
        ValueError: ``out`` has checkpoints newer than ``after``.
        OSError: it cannot be written. In all three cases every older checkpoint is as it was.
    """
    out, step = Path(out), as_integer("step", step, 0)
    model = getattr(model, "_orig_mod", model)
    check_kind("model", model, LanguageModel)
    check_newest(out, after)
    weights = {name: weight.detach().cpu().contiguous() for name, weight in model.state_dict().items()}
    bad = _not_finite(weights, "weight") or _not_finite(trainer_state, "trainer state")
    if bad is not None:
        raise FloatingPointError(f"after step {step} {bad} is not finite: no checkpoint is written; try a smaller lr")
    final, temporary = out / f"checkpoint-{step:08d}", out / f".checkpoint-{step:08d}.tmp"
    make_folder(out)
    for leftover in out.glob(".checkpoint-*.tmp"):
        shutil.rmtree(leftover)
    try:
        _write(temporary, weights, {"model": model.config.to_dict(), "training": training}, trainer_state)
        with naming(final, "cannot be written"):
            os.replace(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(out)
    for old in _checkpoints(out)[:-_KEPT]:
        _delete(old)
    return final


def check_newest(out: Path, after: Path | None) -> None:
    """Refuse to go on in a folder whose newest checkpoint is later than ``after``."""
    newest = latest_checkpoint(out)
    if newest is not None and (after is None or _step(newest) > _step(after)):
        raise ValueError(
            f"{newest} exists: resume() goes on from it; to start anew choose another folder, or delete it with "
            "hypermlp_lab.training.checkpoint.delete_checkpoints"
        )


def is_of_step(folder: Path | None, step: int) -> bool:
    """Whether this checkpoint was written after ``step`` steps."""
    return folder is not None and _step(folder) == step


def latest_checkpoint(out: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint of a run, if there is one."""
    return next(reversed(_checkpoints(Path(out))), None)


def delete_checkpoints(out: Path) -> None:
    """Forget a run."""
    for folder in _checkpoints(out):
        _delete(folder)


def load_model(
    path: str | os.PathLike[str], *, backend: Backend = "auto", device: torch.device | str = "cpu"
) -> LanguageModel:
    """The model of a checkpoint, or of the newest one in a run's folder.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: it does not load.
    """
    folder = _find(path)
    config = read_config(folder)[0]
    weights = read_weights(folder, config)
    model = LanguageModel(config, backend=backend, device=device)
    model.load_state_dict(weights)
    return model


def load_byte_model(
    path: str | os.PathLike[str], *, backend: Backend = "auto", device: torch.device | str = "cpu"
) -> LanguageModel:
    """:func:`load_model` of a model over bytes; ValueError for any other."""
    model = load_model(path, backend=backend, device=device)
    if model.config.vocab_size != BYTE_VOCAB:
        raise ValueError(f"{path} has {model.config.vocab_size} tokens and not {BYTE_VOCAB}, one a byte")
    return model


def read_config(folder: Path) -> tuple[LanguageModelConfig, dict[str, Any]]:
    """Model config of a checkpoint, and what its run is."""
    with reading(folder / _CONFIG):
        config = read_json(folder / _CONFIG)
    if "model_type" in config:
        raise CheckpointError(
            f"{folder} is a model of transformers and no checkpoint of a training run: it opens by "
            "AutoModelForCausalLM.from_pretrained, after import hypermlp.models.huggingface"
        )
    with reading(folder / _CONFIG):
        return LanguageModelConfig(**config["model"]), dict(config["training"])


def read_weights(folder: Path, config: LanguageModelConfig) -> dict[str, Tensor]:
    """A checkpoint's weights on the CPU, by the names and of the shapes that a model of ``config`` has."""
    from safetensors import safe_open
    from safetensors.torch import load

    file = folder / _WEIGHTS
    with reading(file):
        with safe_open(file, framework="pt") as opened:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        _check_shapes(shapes, config)
        return load(_checked_bytes(file))


def load_trainer_state(folder: Path) -> dict[str, Any]:
    """What :func:`save_checkpoint` was given as ``trainer_state``, on the CPU."""
    file = folder / TRAINER
    with reading(file):
        state: dict[str, Any] = torch.load(io.BytesIO(_checked_bytes(file)), map_location="cpu", weights_only=True)
        return state


def _write(folder: Path, weights: dict[str, Tensor], config: dict[str, Any], trainer_state: dict[str, Any]) -> None:
    from safetensors.torch import save

    # through memory: the writers of both formats hide why a file could not be written
    state = io.BytesIO()
    torch.save(trainer_state, state)
    files = {_WEIGHTS: save(weights), TRAINER: state.getvalue()}
    config["sha256"] = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    files[_CONFIG] = (json.dumps(config, indent=2) + "\n").encode()
    make_folder(folder)
    for name, content in files.items():
        write_synced(folder / name, content)
    sync_folder(folder)


def _checked_bytes(file: Path) -> bytes:
    content = file.read_bytes()
    # checkpoints of earlier versions have no checksums
    expected = read_json(file.parent / _CONFIG).get("sha256", {}).get(file.name)
    if expected is not None and hashlib.sha256(content).hexdigest() != expected:
        raise ValueError(f"it is not what was written: its checksum differs from the one in {_CONFIG}")
    return content


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], config: LanguageModelConfig) -> None:
    """Compare with ``config`` before anything of its size is built."""
    numbers = sum(torch.Size(shape).numel() for shape in shapes.values())
    blocks = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    if (numbers, len(blocks)) != (parameter_count(config), config.num_layers):
        raise ValueError(
            f"it has {numbers:,} numbers in {len(blocks):,} blocks and {_CONFIG} describes "
            f"{parameter_count(config):,} in {config.num_layers:,}"
        )
    expected = {name: tuple(x.shape) for name, x in LanguageModel(config, device="meta").state_dict().items()}
    different = sorted(name for name in {*shapes, *expected} if shapes.get(name) != expected.get(name))
    if different:
        name = different[0]
        raise ValueError(f"its {name} is {shapes.get(name)} and {_CONFIG} describes {expected.get(name)}")


def _not_finite(value: Any, name: str) -> str | None:
    """Name of a number in ``value`` that is not finite."""
    if isinstance(value, Mapping):
        parts = [(f"{name} {key}", part) for key, part in value.items()]
        return next((bad for key, part in parts if (bad := _not_finite(part, key))), None)
    if isinstance(value, (list, tuple)):
        return next((bad for part in value if (bad := _not_finite(part, name))), None)
    if isinstance(value, float):
        value = torch.tensor(value)
    return name if isinstance(value, Tensor) and not bool(value.isfinite().all()) else None


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """What is wrong with ``file``, and which checkpoint to take instead."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # the formats' readers raise anything for bytes that are not theirs
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{file} does not load: {reason}. {_remedy(file.parent)}") from error


def _remedy(folder: Path) -> str:
    step = _step(folder)
    before = [other for other in _checkpoints(folder.parent) if _step(other) < step]
    if not before:
        return "There is no checkpoint before it: train anew"
    return f"The one before is {before[-1]}: move {folder} away to go on from there"


def _find(path: str | os.PathLike[str]) -> Path:
    if (Path(path) / _WEIGHTS).is_file():
        return Path(path)
    folder = latest_checkpoint(path)
    if folder is None and Path(path).is_dir() and _NAME.fullmatch(Path(path).name):
        return Path(path)  # a checkpoint without weights: reading it says so
    if folder is None:
        inside = sorted(str(run.parent) for run in Path(path).glob("*/checkpoint-*") if _NAME.fullmatch(run.name))
        remedy = f"there is one in {inside[0]!r}" if inside else "give the --out folder of a training run"
        raise FileNotFoundError(f"no checkpoint in {str(path)!r}: {remedy}")
    return folder


def _checkpoints(out: Path) -> list[Path]:
    """Oldest first."""
    folders = [folder for folder in out.iterdir() if _NAME.fullmatch(folder.name)] if out.is_dir() else []
    return sorted(folders, key=_step)


def _step(folder: Path) -> int:
    name = _NAME.fullmatch(folder.name)
    return -1 if name is None else int(name[1])


def _delete(folder: Path) -> None:
    """Half deleted, it is no checkpoint any more."""
    doomed = folder.with_name(f".{folder.name}.tmp")
    with naming(folder, "cannot be deleted"):
        if doomed.exists():
            shutil.rmtree(doomed)
        os.replace(folder, doomed)
        shutil.rmtree(doomed)
