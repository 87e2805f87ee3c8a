"""Files of a run: written whole or not at all, by one process, with errors that name them."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from filelock import BaseFileLock

_LOCK, _OWNER = ".lock", ".owner"
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)), "free space, or choose another place"),
    errno.EISDIR: "name a file in it, or choose another place",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "change its permissions, or choose another place"),
}
# of folders that some file systems do not sync, or that may be written but not read
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)
# how often the name of a lock's holder is looked for, and the seconds between
_LOOKS, _PAUSE = 20, 0.05


class FolderLock:
    """A folder that no other process or trainer may write into meanwhile; may be entered again by its holder.

    The operating system keeps the lock, so it ends with the process, however that ends.

    Args:
        folder: is made if missing.

    Raises:
        BlockingIOError: another one holds it, named in the message.
        OSError: nothing can be written there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: BaseFileLock | None = None

    def __enter__(self) -> FolderLock:
        from filelock import FileLock, Timeout

        make_folder(self.folder)
        if self._lock is None:
            self._lock = FileLock(self.folder / _LOCK, thread_local=False)
        again = self._lock.is_locked
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise BlockingIOError(
                f"{self.folder} is being written by {self._owner()}: let that end, or choose another folder"
            ) from error
        except OSError as error:
            raise _named(error, self.folder / _LOCK, "cannot be written") from error
        if not again:
            # tells the others who it is: the lock holds without it, and with the disk full it is not written
            with suppress(OSError):
                (self.folder / _OWNER).write_text(f"process {os.getpid()} on {socket.gethostname()}")
        return self

    def __exit__(self, *error: object) -> None:
        assert self._lock is not None
        self._lock.release()

    def _owner(self) -> str:
        """Who holds the lock, given a moment to say so; what an earlier holder left may stand there until then."""
        for _ in range(_LOOKS):
            with suppress(OSError):
                if owner := (self.folder / _OWNER).read_text(errors="replace"):
                    return owner
            time.sleep(_PAUSE)
        return "another process"


def check_folder(folder: Path, *names: str) -> None:
    """:func:`check_place` of a folder and of the files in it that have these names."""
    check_place(folder, folder=True)
    for name in names:
        check_place(folder / name)


def check_place(place: Path, *, folder: bool = False) -> None:
    """Find out before hours of work whether a file, or a folder with files, can be written; makes nothing.

    Raises:
        OSError: it cannot: something else is there, or in the way, or it may not be written.
    """
    with naming(place, "cannot be made a folder" if folder else "cannot be written"):
        there = next(path for path in (place, *place.parents) if path.exists() or path.is_symlink())
        if there == place and not folder:
            if place.is_dir():
                raise IsADirectoryError(errno.EISDIR, "it is a folder, and a file is to be written")
            if not place.is_file():
                raise OSError(errno.EEXIST, "there is something else than a file")
            there = place.parent if os.access(place, os.W_OK) else place
        elif not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{there} is no folder")
        if not os.access(there, os.W_OK):
            raise PermissionError(errno.EACCES, f"{there} may not be written")


def make_folder(folder: Path) -> None:
    """Make ``folder`` and those it lies in, to last."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with naming(folder, "cannot be made a folder"):
        folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def write_synced(file: Path, content: bytes, *, append: bool = False) -> None:
    """Write ``file``, or more at its end, and wait until it is on the disk."""
    with naming(file, "cannot be written"), file.open("ab" if append else "wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())


def replace_file(file: Path, content: bytes) -> None:
    """Write ``file`` whole, its folder made if missing: whatever happens, it holds the old content or the new."""
    make_folder(file.parent)
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        write_synced(temporary, content)
        with naming(file, "cannot be written"):
            os.replace(temporary, file)
    except BaseException:
        if temporary.is_file():
            temporary.unlink()
        raise
    sync_folder(file.parent)


def write_json(file: Path, content: Any, indent: int = 2) -> None:
    """:func:`replace_file` by JSON."""
    replace_file(file, (json.dumps(content, indent=indent) + "\n").encode())


def delete(files: Iterable[Path]) -> None:
    """Those of ``files`` that are there."""
    for file in files:
        with naming(file, "cannot be deleted"):
            file.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Wait until the names in ``folder`` are on the disk, where the system can."""
    if os.name == "nt":  # folders cannot be opened there
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise _named(error, folder, "cannot be written") from error


def read_json(file: Path) -> dict[str, Any]:
    """The object in ``file``.

    Raises:
        ValueError: there is something else in it.
    """
    with naming(file, "cannot be read"):
        content = file.read_bytes()
    try:
        value = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a JSON object, not {type(value).__name__}")
    return value


@contextmanager
def naming(file: Path, what: str) -> Iterator[None]:
    """Errors of the operating system, a full disk among them, with the name of the file and what to do."""
    try:
        yield
    except OSError as error:
        raise _named(error, file, what) from error


def _named(error: OSError, file: Path, what: str) -> OSError:
    remedy = _REMEDIES.get(error.errno or 0, "check that path, or choose another")
    return type(error)(f"{file} {what}: {error.strerror or error}; {remedy}")
