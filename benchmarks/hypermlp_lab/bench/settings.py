"""What a benchmark measures: sizes, what is compared at each of them, and for how long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from numbers import Real
from typing import Any, Generic, TypeVar

import torch

from hypermlp.checks import as_integer, as_number, integer, keep
from hypermlp_lab.bench.gate import GATE_LENGTH
from hypermlp_lab.bench.measure import MODES, Mode


@dataclass(frozen=True, kw_only=True)
class Case:
    """One size to measure."""

    length: int = GATE_LENGTH
    batch: int = 1
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        _check_numbers(self)

    def at(self: C, *lengths: int) -> tuple[C, ...]:
        """The same with other lengths."""
        return tuple(replace(self, length=length) for length in lengths)

    @property
    def factory(self) -> dict[str, Any]:
        return {"device": self.device, "dtype": self.dtype}


@dataclass(frozen=True)
class Provider:
    """Something to measure.

    Attributes:
        name: what tables and results call it.
        description: one line for a reader.
        peak_bytes: a guess at the most extra memory that a case needs, for providers that may not
            fit; None where that is no concern.
        device: the kind of device it needs; None for any.
        baseline: whether the others are compared with it.
    """

    name: str
    description: str
    _: KW_ONLY
    peak_bytes: Callable[[Any], int] | None = None
    device: str | None = None
    baseline: bool = False


def _check_numbers(described: Any) -> None:
    """Sizes that PyTorch can have, and other numbers that a float can be, each called by its name."""
    for name, value in vars(described).items():
        if integer(value) is not None:
            keep(described, (name,), as_integer, 0)
        elif isinstance(value, Real) and not isinstance(value, bool):
            keep(described, (name,), as_number, True)


C = TypeVar("C", bound=Case)
P = TypeVar("P", bound=Provider)


@dataclass(frozen=True)
class Settings(Generic[C]):
    """What a run measures.

    Attributes:
        cases: sizes, measured in this order, on one device in one dtype.
        modes: ``"forward"``, ``"forward+backward"`` or both, where the benchmark has these modes.
        gate_lengths: where everything is checked first.
        threads: CPU threads of PyTorch.
        repeats: most rounds of a case and mode.
        seconds: time after which a case and mode stops, once it has 3 rounds.
        memory_limit: bytes; a provider expected to need more is left out. None: what the device has free.
        longest_call: seconds; a provider expected to need more for one call is left out. None for no limit.
        total_seconds: time after which nothing new is started. None for no limit.
        seed: of parameters and inputs.
    """

    cases: tuple[C, ...]
    modes: tuple[Mode, ...] = MODES
    gate_lengths: tuple[int, ...] = (GATE_LENGTH,)
    threads: int = 1
    repeats: int = 20
    seconds: float = 10.0
    memory_limit: int | None = None
    longest_call: float | None = None
    total_seconds: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _check_numbers(self)

    def plain(self) -> dict[str, Any]:
        """As JSON has it: what all cases share once, the rest as lists, one entry for each case."""
        plain = {name: list(x) if isinstance(x, tuple) else x for name, x in vars(self).items() if name != "cases"}
        cases = [vars(case) | {"dtype": str(case.dtype).removeprefix("torch.")} for case in self.cases]
        for name in cases[0]:
            values = [case[name] for case in cases]
            plain[name] = values[0] if len(set(values)) == 1 else values
        plain["lengths"] = [case["length"] for case in cases]
        del plain["length"]
        return plain


def present(providers: Sequence[P], device: torch.device) -> list[P]:
    """Those that can be measured on ``device``."""
    return [provider for provider in providers if provider.device in (None, device.type)]
