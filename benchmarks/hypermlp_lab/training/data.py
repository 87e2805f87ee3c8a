"""Text as byte tokens, split by file into train and validation."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# not source to learn from: tests, installed packages, caches
_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "__pycache__"})
# ends every file; also what a sample from scratch starts with
END_OF_TEXT = 0
_END = bytes([END_OF_TEXT])
# bytes hashed at a time
_PIECE = 1 << 20


@dataclass(frozen=True)
class Corpus:
    """Byte tokens of a training and a validation set, uint8 ``[n]``, each file ended by a zero.

    Args:
        name: where the text came from.
        train, validation: the tokens.
        train_files, validation_files: relative paths. Of a single file both parts come.
    """

    name: str
    train: Tensor
    validation: Tensor
    train_files: tuple[str, ...]
    validation_files: tuple[str, ...]

    def fingerprint(self) -> str:
        """A hash of all tokens: a run can only be resumed on the same ones."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation):
            digest.update(f"{part.numel()}:".encode())
            for start in range(0, part.numel(), _PIECE):  # numpy, which would do it at once, is optional
                digest.update(bytes(part[start : start + _PIECE].tolist()))
        return digest.hexdigest()

    def check_length(self, seq_len: int) -> None:
        """Both parts must hold one window of ``seq_len`` tokens and the token after it."""
        for name, part in (("training", self.train), ("validation", self.validation)):
            if part.numel() <= seq_len:
                raise ValueError(
                    f"the {name} part of {self.name} has {part.numel()} bytes, too few for seq_len={seq_len}: "
                    "give more text or a smaller seq_len"
                )

    def batch(self, batch_size: int, seq_len: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random training windows: inputs and targets, int64 ``[batch_size, seq_len]``."""
        starts = torch.randint(self.train.numel() - seq_len, (batch_size,), generator=generator)
        return _windows(self.train, starts, seq_len)

    def validation_windows(self, count: int, seq_len: int) -> tuple[Tensor, Tensor]:
        """``count`` windows (or as many as fit) spread evenly, the same ones every time."""
        fitting = (self.validation.numel() - 1) // seq_len
        count = min(count, fitting)
        starts = torch.arange(count) * fitting // count * seq_len
        return _windows(self.validation, starts, seq_len)


def standard_library() -> Path:
    """Folder of the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def load_corpus(path: str | os.PathLike[str] | None = None, *, validation_fraction: float = 0.05) -> Corpus:
    """Read text as bytes and set some of its files apart for validation.

    Which files does not depend on the machine: they are taken in the order of a hash of their
    relative path. A file with the bytes of an earlier one is left out, so that no text is in both
    parts. A single file is cut in two: its end is the validation part.

    Args:
        path: a text file, or a folder whose text files are read, hidden ones, tests and installed
            packages apart. None: the Python standard library's source.
        validation_fraction: of the bytes, at most, above 0 and below 1.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: there is no text in it, or too little to split.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must be between 0 and 1, got {validation_fraction!r}")
    root = standard_library() if path is None else Path(path).expanduser()
    name = "the Python standard library" if path is None else str(path)
    if root.is_file():
        return _split_file(root, name, validation_fraction)
    if not root.is_dir():
        raise FileNotFoundError(f"no text file or folder at {name!r}: check the path given as data")
    texts = dict(_read_folder(root, only_python=path is None))
    if not texts:
        raise ValueError(f"no text in {name}: give a folder with text files, or one text file")
    if len(texts) == 1:
        only = next(iter(texts))
        return _split_file(root / only, str(root / only), validation_fraction)
    chosen = _choose_validation({file: len(text) for file, text in texts.items()}, validation_fraction)
    train, validation = tuple(file for file in texts if file not in chosen), tuple(sorted(chosen))
    learnt, unseen = (_tokens(texts[file] for file in files) for files in (train, validation))
    return Corpus(name, learnt, unseen, train, validation)


def _read_folder(root: Path, *, only_python: bool) -> Iterator[tuple[str, bytes]]:
    seen: set[bytes] = set()
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith("."))
        for name in sorted(files):
            if name.startswith(".") or (only_python and not name.endswith(".py")):
                continue
            file = Path(folder, name)
            text = file.read_bytes() if file.is_file() else b""
            digest = hashlib.sha256(text).digest()
            if text.strip() and _END not in text and digest not in seen:
                seen.add(digest)
                yield file.relative_to(root).as_posix(), text


def _choose_validation(sizes: dict[str, int], fraction: float) -> set[str]:
    room = fraction * sum(sizes.values())
    chosen = set()
    for file in sorted(sizes, key=lambda file: hashlib.sha256(file.encode()).digest()):
        if sizes[file] <= room:
            room -= sizes[file]
            chosen.add(file)
    return chosen or {min(sizes, key=lambda file: (sizes[file], file))}


def _split_file(file: Path, name: str, fraction: float) -> Corpus:
    text = file.read_bytes()
    if not text.strip():
        raise ValueError(f"{name} is empty: give a file with text")
    if _END in text:
        raise ValueError(f"{name} holds zero bytes and is no text: give a text file or a folder")
    cut = len(text) - int(len(text) * fraction)
    return Corpus(name, _tokens([text[:cut]]), _tokens([text[cut:]]), (file.name,), (file.name,))


def _tokens(texts: Iterator[bytes] | list[bytes]) -> Tensor:
    buffer = bytearray()
    for text in texts:
        buffer += text + _END
    return torch.frombuffer(buffer, dtype=torch.uint8)


def _windows(tokens: Tensor, starts: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
    windows = tokens[starts[:, None] + torch.arange(seq_len + 1)].long()
    return windows[:, :-1], windows[:, 1:]
