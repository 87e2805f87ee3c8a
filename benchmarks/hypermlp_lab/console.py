"""What the commands share: errors in one line, and devices by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import typer

# what PyTorch's allocator on the CPU says; on a GPU it has a class of its own
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")


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


def chosen_device(name: str) -> torch.device:
    """The device that ``--device`` names, which is there and has memory.

    Raises:
        ValueError: it is not.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0][:120]
        raise ValueError(f"--device {name!r} does not work here ({reason}): try cpu, cuda or auto") from error
    if device.type == "meta":
        raise ValueError("--device meta holds no values: try cpu, cuda or auto")
    return device


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY)
