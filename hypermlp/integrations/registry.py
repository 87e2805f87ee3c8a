"""Which attention modules can be replaced: adapters, found by what a module's class is.

A class is known by where it was written (``transformers.models.llama.modeling_llama.LlamaAttention``), so that
knowing a library does not import it, and another library's class of the same name is not taken for it. What counts
is the class whose ``forward`` runs: a subclass with a ``forward`` of its own is called in a way of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from importlib import import_module
from typing import Any, ClassVar

from torch import nn

from hypermlp.integrations.host import Host, nearest
from hypermlp.integrations.hosts import MODULES
from hypermlp.layers import AttentionLayer

Predicate = Callable[[nn.Module], bool]
Which = str | type[nn.Module] | Predicate


class Adapter(ABC):
    """How one family of attention modules is read, and what stands in its place.

    Example:
        A model whose attention is called as ``attention(x)`` needs only a description::

            class MyAdapter(Adapter):
                def describe(self, module):
                    return Host(hidden_size=module.dim, num_heads=module.heads, max_length=module.context)

            register(MyAdapter(), MyAttention)
    """

    def at(self, model: nn.Module, name: str) -> Adapter:
        """The adapter for the module called ``name`` in ``model``, where its place says more than it does itself."""
        return self

    @abstractmethod
    def describe(self, module: nn.Module) -> Host:
        """What ``module`` is; ValueError, saying why, for one that cannot be replaced."""

    def wrap(self, layer: AttentionLayer, module: nn.Module, host: Host) -> nn.Module:
        """What takes the place of ``module``: here ``layer`` itself, called with hidden states alone."""
        return layer

    def skip(self, module: nn.Module) -> str | None:
        """Why this module is left as it is (cross-attention, say); None to replace it."""
        return None

    def finish(self, model: nn.Module, swaps: Sequence[Mapping[str, Any]]) -> None:
        """Called when replacements or originals have been put in place.

        Args:
            model: the host model.
            swaps: what stands there now: ``{"layers": [places], "config": {fields of HyperConfig}}``
                for each kind of layer, plain JSON values; empty when all originals are back.

        Raises:
            ValueError: where they cannot stand together; the swap is then undone.
        """
        return


class Stays(Adapter):
    """For modules that are left as they are.

    Args:
        reason: why, for the report.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def describe(self, module: nn.Module) -> Host:
        raise ValueError(self.reason)

    def skip(self, module: nn.Module) -> str:
        return self.reason


class SizedAdapter(Adapter):
    """For attention that is told by a module around it how many tokens it sees, and projects its output with dropout.

    Attributes:
        wrapper: what stands in the host's place, made of the layer and the probability of dropout after it.

    Args:
        length: tokens it sees where no module around says.
    """

    wrapper: ClassVar[type[nn.Module]]

    def __init__(self, length: int | None = None) -> None:
        self.length = length

    @staticmethod
    @abstractmethod
    def tokens(around: Any) -> int | None:
        """Tokens that the attention within a module sees; None if the module does not say."""

    def at(self, model: nn.Module, name: str) -> Adapter:
        here = copy(self)
        here.length = nearest(model, name, self.tokens) or self.length
        return here

    def wrap(self, layer: AttentionLayer, module: nn.Module, host: Host) -> nn.Module:
        return self.wrapper(layer, host.output_dropout)


def hold_off(holder: nn.Module, name: str, off: bool) -> None:
    """Let a switch of a host's module be False while ``off``, and afterwards what it was before."""
    key = f"_{name}_before"
    before = holder.__dict__.pop(key, getattr(holder, name))
    setattr(holder, name, before and not off)
    if off:
        holder.__dict__[key] = before


# in the order of their registration; the last one that fits counts
_registered: dict[Which, Adapter] = {}


def register(adapter: Adapter, *modules: Which) -> None:
    """Let :func:`swap_attention` know attention modules.

    Args:
        adapter: how they are read and replaced; the last one registered for a module counts, and all of
            them before those of this library.
        modules: which modules. A class and its subclasses; the name of a class, bare (``"MyAttention"``, of any
            library) or with its module's (``"mylib.layers.MyAttention"``); or a function that is given a
            module and says whether it is meant.
    """
    _check_adapter(adapter)
    _check_which(modules)
    for which in modules:
        _registered.pop(which, None)  # so that it is the last one again
        _registered[which] = adapter


def unregister(*modules: Which) -> None:
    """Forget what :func:`register` was told about ``modules``; this library's own adapters count again.

    Args:
        modules: as they were registered.

    Raises:
        ValueError: for one that is not registered; nothing changes.
    """
    _check_which(modules)
    for which in modules:
        if which not in _registered:
            known = ", ".join(sorted(map(str, _registered))) or "nothing"
            raise ValueError(f"{which!r} is not registered. Registered: {known}")
    for which in modules:
        _registered.pop(which, None)


def find(module: nn.Module, given: Mapping[Which, Adapter] | None = None) -> Adapter | None:
    """The adapter of a module: one of ``given``, else one that was registered, else our own."""
    for known in (given or {}, _registered):
        found = next((adapter for which, adapter in reversed(list(known.items())) if _is(module, which)), None)
        if found is not None:
            return found
    own = MODULES.get(_written(type(module))) or MODULES.get(type(module).__name__)
    if own is None:
        return None
    adapter: Adapter = import_module(f"hypermlp.integrations.hosts.{own}").ADAPTER
    return adapter


def as_mapping(adapter: Adapter | Mapping[Which, Adapter] | None) -> Mapping[Which, Adapter]:
    """What came as ``adapter=``: one adapter is for all modules that call themselves attention."""
    if adapter is None:
        return {}
    if isinstance(adapter, Adapter):
        return {calls_itself_attention: adapter}
    if not isinstance(adapter, Mapping):
        raise TypeError(f"adapter must be an Adapter, or {{module: Adapter}}, got {adapter!r}")
    for value in adapter.values():
        _check_adapter(value)
    _check_which(tuple(adapter))
    return adapter


def known_classes() -> list[str]:
    """Names of all classes that can be replaced, without their modules'."""
    return sorted({_name(which).rpartition(".")[2] for which in (*MODULES, *_registered)})


def calls_itself_attention(module: nn.Module) -> bool:
    """Whether a module's class has attention in its name, or ``attn``."""
    name = type(module).__name__.lower()
    return "attention" in name or "attn" in name


def _is(module: nn.Module, which: Which) -> bool:
    if isinstance(which, str):
        return which in (type(module).__name__, path_of(type(module)))
    return isinstance(module, which) if isinstance(which, type) else bool(which(module))


def _written(cls: type) -> str:
    """The class whose ``forward`` runs, by name."""
    return path_of(next(base for base in cls.__mro__ if "forward" in vars(base) or base is object))


def path_of(cls: type) -> str:
    """Where a class was written, and its name."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _name(which: Which) -> str:
    if isinstance(which, str):
        return which
    return path_of(which) if isinstance(which, type) else f"{getattr(which, '__name__', which)}(module)"


def _check_adapter(adapter: Any) -> None:
    if not isinstance(adapter, Adapter):
        raise TypeError(f"adapter must be an Adapter (an instance), got {adapter!r}")


def _check_which(modules: tuple[Any, ...]) -> None:
    for which in modules:
        a_class = isinstance(which, type)
        if (not isinstance(which, str) and not callable(which)) or (a_class and not issubclass(which, nn.Module)):
            raise TypeError(
                f"modules must be classes of modules, names of classes, or functions of a module, got {which!r}"
            )
    if not modules:
        raise TypeError("modules are missing: name at least one class, or a function that says which modules are meant")
