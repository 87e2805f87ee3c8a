"""What several doors check alike. Every message names the argument, what came, and what it may be."""

from __future__ import annotations

import dataclasses
import functools
import operator
import sys
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from typing import Any, TypeGuard, TypeVar

from torch import Tensor, nn

_TOO_LARGE = 2**63
# how alike two names are that may be meant for each other: max_lags and max_lag are, mixer and mix_rank are not
_ALIKE = 0.7

Cls = TypeVar("Cls", bound=type)


def is_integer(value: object) -> TypeGuard[int]:
    """Whether ``value`` is an integer; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_kind(name: str, value: object, kind: type, remedy: str = "") -> None:
    """Something of a ``kind``; ``remedy`` says how to come by it."""
    if not isinstance(value, kind):
        called = {Tensor: "tensor", nn.Module: "module"}.get(kind, kind.__name__)
        raise TypeError(f"{name} must be a {called}, got {type(value).__name__}" + (f": {remedy}" if remedy else ""))


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """One of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)}, got {shown(value)}")


def check_names(caller: str, given: Iterable[str], known: Collection[str]) -> None:
    """Keywords that ``caller`` has; TypeError for the first that it has not, and which one may be meant."""
    for name in given:
        if name not in known:
            raise TypeError(f"{caller} takes no {name!r}: {did_you_mean(name, known) or f'it takes {_listed(known)}'}")


def did_you_mean(name: str, known: Collection[str]) -> str:
    """A question after those of ``known`` with a word that begins with ``name``, or the most alike one; else empty."""
    near = [other for other in known if len(name) > 2 and f"_{name}" in f"_{other}"]
    near = near or get_close_matches(name, known, 1, _ALIKE)
    return f"did you mean {_listed(near, 'or')}?" if near else ""


def _listed(names: Collection[str], last: str = "and") -> str:
    *first, final = names or ("no keyword",)
    return f"{', '.join(first)} {last} {final}" if first else final


def named_fields(cls: Cls) -> Cls:
    """A decorator of dataclasses: a keyword that is no field is refused by :func:`check_names`."""
    init: Any = cls.__init__  # type: ignore[misc]
    known = [field.name for field in dataclasses.fields(cls) if field.init]

    @functools.wraps(init)
    def checked(self: object, *args: Any, **kwargs: Any) -> None:
        check_names(cls.__name__, kwargs, known)
        init(self, *args, **kwargs)

    cls.__init__ = checked  # type: ignore[misc]
    return cls


def check_flag(name: str, value: object) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")


def check_truth(name: str, value: object) -> None:
    """What is as good as True or False and is not kept: 1 and 0, NumPy's and PyTorch's own, too."""
    number = isinstance(value, int) or getattr(value, "shape", None) == ()
    if not (number and value in (0, 1)):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")


def check_size(name: str, value: object, least: int = 1) -> None:
    """An integer from ``least`` on that a size of PyTorch's can be."""
    if not (is_integer(value) and least <= value < _TOO_LARGE):
        kind = "a positive integer" if least == 1 else f"an integer >= {least}"
        bound = " below 2**63" if isinstance(value, int) and value >= _TOO_LARGE else ""
        raise ValueError(f"{name} must be {kind}{bound}, got {shown(value)}")


def as_integer(name: str, value: object, least: int | None = None) -> int:
    """``value`` as Python's integer, of whatever library, from ``least`` on."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:  # arrays have one to refuse it
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {shown(value)}")
    if least is not None and number < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {shown(number)}")
    return number


def check_sizes(**values: object) -> None:
    """Positive integers, each a size."""
    for name, value in values.items():
        check_size(name, value)


def check_number(name: str, value: object, *, zero: bool = False) -> None:
    """A number above 0, or at least 0 if ``zero``, that a float can be."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    if not 0 <= value <= sys.float_info.max or (value == 0 and not zero):
        raise ValueError(f"{name} must be {'>= 0' if zero else 'positive'} and finite, got {shown(value)}")


def shown(value: object) -> str:
    """``repr``, but of integers with thousands of digits, which Python refuses to write; of NumPy's, a remedy."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    if getattr(value, "shape", None) == ():
        return f"{value!r}, which is a {type(value).__module__} scalar: give its item()"
    return repr(value)
