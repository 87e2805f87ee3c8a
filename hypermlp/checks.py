"""What several doors check alike. Every message names the argument, what came, and what it may be."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import operator
import sys
from collections.abc import Callable, Collection, Iterable
from difflib import get_close_matches
from numbers import Real
from typing import Any, TypeVar

from torch import Tensor, nn

_TOO_LARGE = 2**63
# how alike two names are that may be meant for each other: max_lags and max_lag are, mixer and mix_rank are not
_ALIKE = 0.7

# what other libraries call what is here called so, where letters do not tell
_ELSEWHERE = {
    **dict.fromkeys(("n_embd", "d_model", "embed_dim", "embedding_size", "hidden_dim", "dim"), ("hidden_size",)),
    **dict.fromkeys(("n_head", "n_heads", "nhead", "num_attention_heads"), ("num_heads", "num_attention_heads")),
    **dict.fromkeys(("n_layer", "n_layers", "num_blocks", "depth"), ("num_layers", "num_hidden_layers")),
    **dict.fromkeys(
        ("n_positions", "n_ctx", "block_size", "max_seq_len", "max_sequence_length", "seq_length"),
        ("context_length", "max_position_embeddings"),
    ),
    **dict.fromkeys(
        ("n_inner", "d_ff", "ffn_dim", "dim_feedforward", "ffn_hidden_size", "intermediate_dim"), ("intermediate_size",)
    ),
    **dict.fromkeys(("layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps"), ("norm_eps", "rms_norm_eps")),
    **dict.fromkeys(("window", "window_size", "sliding_window"), ("max_lag",)),
    **dict.fromkeys(("attention_bias", "qkv_bias"), ("bias",)),
    **dict.fromkeys(("eos_token_id", "stop_strings"), ("stop",)),
    "head_dim": ("qk_dim", "v_dim"),
    "max_length": ("max_new_tokens",),
    "tie_weights": ("tie_embeddings", "tie_word_embeddings"),
    "do_sample": ("temperature", "top_k", "top_p"),
    "num_return_sequences": ("num_samples",),
}

Cls = TypeVar("Cls", bound=type)


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


def called_here(name: str, known: Collection[str]) -> list[str]:
    """Those of ``known`` that other libraries call ``name``."""
    return [other for other in _ELSEWHERE.get(name, ()) if other in known]


def did_you_mean(name: str, known: Collection[str]) -> str:
    """A question after those of ``known`` that are called ``name`` elsewhere, have a word that begins so, or are alike.

    Empty where there are none.
    """
    near = called_here(name, known)
    near = near or [other for other in known if len(name) > 2 and f"_{name}" in f"_{other}"]
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

    checked.__signature__ = inspect.signature(init)  # type: ignore[attr-defined]  # for who does not look behind it
    cls.__init__ = checked  # type: ignore[misc]
    return cls


def as_flag(name: str, value: object, may_be: str = "True or False") -> bool:
    """``value`` as Python's bool: it, or NumPy's."""
    if isinstance(value, bool):
        return value
    if getattr(value, "shape", None) == () and str(getattr(value, "dtype", None)) == "bool":
        return bool(value)
    raise TypeError(f"{name} must be {may_be}, got {shown(value)}")


def integer(value: object) -> int | None:
    """``value`` as Python's integer, of whatever library; None for what is none, as bools, floats and tensors are."""
    if isinstance(value, (bool, Tensor)):
        return None
    try:
        # an enumeration's may be of a class of its own
        return value if type(value) is int else operator.index(value)  # type: ignore[arg-type]
    except TypeError:  # arrays have an index to refuse it
        return None


def as_integer(name: str, value: object, least: int | None = None, remedy: str = "") -> int:
    """``value`` as Python's integer, see :func:`integer`, from ``least`` on and such that PyTorch's can hold it."""
    found = integer(value)
    if found is not None and (-_TOO_LARGE if least is None else least) <= found < _TOO_LARGE:
        return found
    kind = {None: "an integer", 1: "a positive integer"}.get(least, f"an integer >= {least}")
    bound = " that fits into 64 bits" if found is not None and abs(found) >= _TOO_LARGE else ""
    error = TypeError if found is None else ValueError
    raise error(f"{name} must be {kind}{bound}, got {shown(value)}{remedy and f': {remedy}'}")


def as_sizes(**values: object) -> list[int]:
    """Positive integers, each a size."""
    return [as_integer(name, value, 1) for name, value in values.items()]


def keep(described: object, names: Iterable[str], check: Callable[..., object], *args: object) -> None:
    """Let a frozen dataclass hold what ``check(name, value, *args)`` makes of each of these fields."""
    for name in names:
        object.__setattr__(described, name, check(name, getattr(described, name), *args))


def number(value: object) -> float | None:
    """``value`` as Python's number, of whatever library; None for what is none, as bools and tensors are."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        return value if isinstance(value, int) else float(value)
    except OverflowError:  # of a fraction
        return math.inf


def as_number(name: str, value: object, zero: bool = False) -> float:
    """``value`` as Python's number, see :func:`number`: above 0, or from 0 on if ``zero``, and what a float can be."""
    found = number(value)
    if found is None:
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    if not 0 <= found <= sys.float_info.max or (found == 0 and not zero):
        raise ValueError(f"{name} must be {'>= 0' if zero else 'positive'} and finite, got {shown(value)}")
    return found


def shown(value: object) -> str:
    """``repr``, but of integers with thousands of digits, which Python refuses to write; of NumPy's, a remedy."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    if getattr(value, "shape", None) == ():
        return f"{value!r}, which is a {type(value).__module__} scalar: give its item()"
    return repr(value)
