"""Builds the C++ sources with the system's compiler, once, and loads them.

The library is kept in the user's cache folder under a name that its sources, flags and compiler make. It has a plain C
interface and needs neither Python's nor PyTorch's headers, so one build serves every version of both.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import torch

_SOURCES = Path(__file__).parent
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = (
    "-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fno-exceptions", "-fno-rtti",
    "-shared", "-fPIC", "-pthread",
)  # fmt: skip
# by what PyTorch says of an x86 CPU: named one by one, since not every compiler knows the levels' names
_FEATURES = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
}
_PRECISIONS = {torch.float32: (), torch.float64: ("-DHYPERMLP_DOUBLE",)}
_TIMEOUT = 600  # seconds


class UnavailableError(RuntimeError):
    """Why there is no library, in words for a user."""


@cache
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """The kernels that compute in ``dtype``, float32 or float64. UnavailableError says why there are none."""
    # what failed once fails again, and is not tried for every call
    found = _load_or_reason(dtype)
    if isinstance(found, str):
        raise UnavailableError(found)
    return found


@cache
def _load_or_reason(dtype: torch.dtype) -> ctypes.CDLL | str:
    try:
        return _load(build(dtype))
    except UnavailableError as error:
        return str(error)


def build(dtype: torch.dtype) -> Path:
    """The library's file, compiled if it is not there. UnavailableError says why it cannot be."""
    flags = (*_FLAGS, *_machine_flags(), *_PRECISIONS[dtype])
    sources = sorted(path for path in _SOURCES.iterdir() if path.suffix in (".cpp", ".h"))
    digest = hashlib.sha256("\0".join(flags).encode())
    for path in sources:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    key, folder, compiler = digest.hexdigest()[:24], private_folder(), find_compiler()
    if compiler is None:
        # built ahead, where there was a compiler
        made = sorted(folder.glob(f"{key}-*.so"), key=lambda path: path.stat().st_mtime)
        if not made:
            raise UnavailableError("there is no C++ compiler: install one (such as g++), or set CXX")
        return made[-1]
    path = folder / f"{key}-{_identity(compiler)}.so"
    if not path.exists():
        with _lock(folder):
            if not path.exists():
                _compile(compiler, flags, [source for source in sources if source.suffix == ".cpp"], path)
    return path


def find_compiler() -> str | None:
    """``$CXX`` if it is set, else the first of the usual names."""
    chosen = os.environ.get("CXX")
    return next((path for name in ([chosen] if chosen else _COMPILERS) if (path := shutil.which(name))), None)


def private_folder() -> Path:
    """Where libraries are kept. It is made for the user alone, and refused where others could put a library into it."""
    if os.name != "posix":
        raise UnavailableError(f"the kernels are built on Linux and macOS, not on {sys.platform}")
    try:
        if chosen := os.environ.get("XDG_CACHE_HOME"):
            base = Path(chosen)
        else:
            base = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
        base.mkdir(parents=True, exist_ok=True)
        folder = base / "hypermlp" / "native"
        for made in (folder.parent, folder):
            made.mkdir(mode=0o700, exist_ok=True)
            _check_private(made)
    except (OSError, RuntimeError) as error:
        if isinstance(error, UnavailableError):
            raise
        raise UnavailableError(
            f"there is no cache folder: {error}; set XDG_CACHE_HOME to one that you can write"
        ) from error
    return folder


def _check_private(path: Path) -> None:
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        raise UnavailableError(f"{path} is a link: set XDG_CACHE_HOME to the folder itself")
    if found.st_uid != os.geteuid():
        raise UnavailableError(
            f"{path} belongs to another user: remove it, or set XDG_CACHE_HOME to a folder of your own"
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UnavailableError(f"others can write to {path}, and could put code there: chmod go-w {path}")


def _machine_flags() -> tuple[str, ...]:
    machine = platform.machine().lower()
    if machine in ("aarch64", "arm64"):
        return ()
    capability = torch.backends.cpu.get_cpu_capability()
    if machine not in ("x86_64", "amd64") or capability not in _FEATURES:
        raise UnavailableError(f"the kernels need AVX2 or a 64-bit ARM, and this is {machine} with {capability}")
    return _FEATURES[capability]


def _identity(compiler: str) -> str:
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, timeout=_TIMEOUT, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise UnavailableError(f"the compiler {compiler} does not run: {error}") from error
    return hashlib.sha256(compiler.encode() + b"\0" + version).hexdigest()[:16]


def _compile(compiler: str, flags: tuple[str, ...], sources: list[Path], path: Path) -> None:
    """Beside its place, and moved there when it is whole: nobody ever loads a part of it."""
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            _run([compiler, *flags, "-o", str(made), *map(str, sources)])
            made.chmod(0o700)
            made.replace(path)
    except OSError as error:
        raise UnavailableError(
            f"{path.parent} cannot be written: {error}; set XDG_CACHE_HOME to a folder that can"
        ) from error


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise UnavailableError(f"the compiler {command[0]} does not run: {error}") from error
    if done.returncode != 0:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-300:])
        raise UnavailableError(f"{command[0]} failed ({done.returncode}): {first.strip()}")


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One process compiles, others wait for it; where the file system has no locks each compiles for itself."""
    import fcntl

    try:
        lock = (folder / "lock").open("a")
    except OSError as error:
        raise UnavailableError(
            f"{folder} cannot be written: {error}; set XDG_CACHE_HOME to a folder that can"
        ) from error
    with lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _load(path: Path) -> ctypes.CDLL:
    _check_private(path)
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise UnavailableError(f"{path} cannot be loaded: {error}") from error
    for name in ("forward", "backward", "step", "conv"):
        getattr(loaded, f"hypermlp_{name}_bytes").restype = ctypes.c_int64
        getattr(loaded, f"hypermlp_{name}").restype = None
    return loaded
