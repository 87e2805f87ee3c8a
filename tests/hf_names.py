"""What transformers' releases call differently, for tests: a deprecated name is an error there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers


def set_checkpointing(model: Any, on: bool = True, **options: Any) -> None:
    """Switch activation checkpointing, which was gradient checkpointing before transformers 5.24."""
    verb = "enable" if on else "disable"
    switch = getattr(model, f"activation_checkpointing_{verb}", None) or getattr(
        model, f"gradient_checkpointing_{verb}"
    )
    switch(*([options] if options else []))


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings from transformers, where it uses by itself what it calls deprecated."""
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity(before)
