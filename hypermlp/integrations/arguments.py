"""What a host hands to its attention besides the arguments that a wrapper knows: used, ignored by name, or refused."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

from hypermlp.checks import did_you_mean

_OF_A_REPLACEMENT = ", or restore_attention(model) and leave this module out (layers=...)"


def refuse_unknown(
    given: Mapping[str, Any],
    ignored: Mapping[str, str],
    caller: str,
    library: str,
    otherwise: str = _OF_A_REPLACEMENT,
    door: Callable[..., Any] | None = None,
) -> None:
    """Let nothing pass whose meaning is not known: it might say what the layer must do.

    Args:
        given: the arguments that the wrapper has no parameter for.
        ignored: names that may be ignored, and why.
        caller: who was called, for the message.
        library: the host's package, whose version the message names.
        otherwise: what to do but to leave it out, for the message.
        door: what was called, where users call it themselves and may have misspelt a name of its own.

    Raises:
        TypeError: for a name that is not in ``ignored`` and has another value than None.
    """
    for name, value in given.items():
        if value is not None and name not in ignored:
            release = getattr(sys.modules.get(library), "__version__", "of an unknown version")
            meant = did_you_mean(name, _names(door)) if door else ""
            raise TypeError(
                f"{caller} got {name}={_brief(value)} from {library} {release}, and does not know what it "
                f"means: {meant or f'leave it out or pass None{otherwise}'}"
            )


def _names(door: Callable[..., Any]) -> list[str]:
    return [x.name for x in signature(door).parameters.values() if x.kind is not x.VAR_KEYWORD]


def _brief(value: Any) -> str:
    """A value in few characters; of tensors, caches and other objects the class."""
    return repr(value) if isinstance(value, (bool, int, float, str)) else f"a {type(value).__name__}"
