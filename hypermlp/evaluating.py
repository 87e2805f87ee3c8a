"""Evaluation mode for a while, of a model that several may use at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import RLock
from weakref import WeakKeyDictionary

from torch import nn


@dataclass
class _Held:
    """A model in evaluation mode: how many use it, and the mode that each of its modules goes back to."""

    users: int = 0
    modes: list[tuple[nn.Module, bool]] = field(default_factory=list)


_HELD: WeakKeyDictionary[nn.Module, _Held] = WeakKeyDictionary()
# reentrant: the garbage collector may end a forgotten iterator while its thread is in here
_HELD_LOCK = RLock()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode until the last of those who use ``model`` so, in any thread, has ended.

    Flags alone change, and each module's own is afterwards what it was: ``train()`` may do more.
    """
    with _HELD_LOCK:
        held = _HELD.setdefault(model, _Held())
        held.users += 1
        if held.users == 1:
            held.modes = [(module, module.training) for module in model.modules()]
            for module, _ in held.modes:
                module.training = False
    try:
        yield
    finally:
        with _HELD_LOCK:
            held.users -= 1
            if not held.users:
                del _HELD[model]
                for module, training in held.modes:
                    module.training = training
