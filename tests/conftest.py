"""For every test: one thread, fixed seeds, no luck with memory that was never written, nothing deprecated in use."""

from __future__ import annotations

import gc
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _device

from hypermlp.ops import native

# remembered by PyTorch on first use: it must be the true functions that it remembers
_device._device_constructors()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that workers of pytest-xdist end at the same time."""
    items.sort(key=lambda item: item.path.name != "test_interpreted.py")


def pytest_collection_finish() -> None:
    """What is there by now stays to the end: the garbage collector need not look at it again and again."""
    gc.collect()
    gc.freeze()


def _poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``make``, whose floating-point result holds NaN when the library asks for it."""

    def allocate(*args: Any, **kwargs: Any) -> Tensor:
        made = make(*args, **kwargs)
        asked_by_library = sys._getframe(1).f_globals.get("__name__", "").startswith("hypermlp")
        if asked_by_library and made.is_floating_point():
            with torch.no_grad():
                made.fill_(float("nan"))
        return made

    return allocate


@pytest.fixture(autouse=True)
def _poison_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A result that depends on memory nobody wrote is then NaN, and no test passes by luck."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # torch.manual_seed keeps a stack for the GPU that it waits for, which takes longer than many a test
    (torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed)(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _native_needs_a_compiler(request: pytest.FixtureRequest) -> None:
    """A test of the native path is skipped, and never quietly of another path, where it cannot be built."""
    chosen = getattr(request.node, "callspec", None)
    if chosen is not None and "native" in (x for x in chosen.params.values() if isinstance(x, str)):
        request.getfixturevalue("native_path")


@pytest.fixture
def native_path() -> None:
    """For tests of the native path alone, which name no path: skipped likewise."""
    reason = native.unavailable(torch.empty(0))
    if reason is not None:
        pytest.skip(f"the native path is not there: {reason}")


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    """Forty small files to train on."""
    folder = tmp_path / "text"
    folder.mkdir()
    for index in range(40):
        lines = (f"line {number} of file {index}: {number * index % 97}\n" for number in range(20))
        (folder / f"file{index}.txt").write_text("".join(lines))
    return folder


class _Deprecations(logging.Handler):
    """Warns where a library logs that something is deprecated, so that one place says what is let through."""

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecat" in record.getMessage().lower():
            warnings.warn(f"{record.name}: {record.getMessage()}", DeprecationWarning, stacklevel=2)


@pytest.fixture(autouse=True)
def _deprecations_are_errors() -> Iterator[None]:
    """Also those that are logged and not warned of, as most are in transformers.

    pyproject.toml turns warnings into errors, from anywhere: a warning about an argument is attributed to the
    caller, and the caller of a model's forward is torch.nn.
    """
    handler = _Deprecations(logging.WARNING)
    # a logger that does not propagate needs a handler of its own
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub", "accelerate", "peft", "timm")]
    for logger in loggers:
        logger.addHandler(handler)
    yield
    for logger in loggers:
        logger.removeHandler(handler)
