"""What the commands share: options, lines of text, errors in one line, and devices by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

# what PyTorch's allocator on the CPU says; on a GPU it has a class of its own
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")
# shell convention for a program ended by Ctrl-C: 128 + SIGINT
INTERRUPTED = 130

Data = Annotated[Path | None, typer.Option(help="Text file or folder. Default: Python's standard library.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")]


def say(console: Console, line: str) -> None:
    """One line of plain text, which whoever copies it gets as one."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def require(what: str, *packages: str) -> None:
    """ValueError where ``what`` needs packages that are not installed."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ValueError(f'{what} needs {", ".join(missing)}: in a clone, pip install -e ".[lab]"')


@contextmanager
def user_errors() -> Iterator[None]:
    """One line instead of a traceback for what the user can mend."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        message = " ".join(str(error).split())
        typer.echo(f"hypermlp: {message}", err=True)
        raise typer.Exit(2) from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_out_of_memory(error):
            raise
        typer.echo("hypermlp: out of memory: ask for a smaller model, smaller batches or shorter texts", err=True)
        raise typer.Exit(2) from error


def chosen_device(name: str, choices: str = "cpu, cuda, cuda:1, ... or auto") -> torch.device:
    """The device that ``--device`` names, which is there and has memory; ``choices`` are told where it is not.

    Raises:
        ValueError: it is not.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name!r} names no device: say {choices}") from error
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0][:120]
        raise ValueError(f"--device {name!r} does not work here ({reason}): say {choices}") from error
    if device.type == "meta":
        raise ValueError(f"--device meta holds no values: say {choices}")
    return device


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY)
