"""Where the attention modules of a model are: those that can be replaced, have been, or are left alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from hypermlp.config import HyperConfig
from hypermlp.integrations import registry
from hypermlp.integrations.swap_report import Left
from hypermlp.layers import AttentionLayer

_MARK = "_replaced_attention"
CROSS = "cross-attention reads another sequence, and a hyper layer its own alone: it stays the host's"
CROSS_ATTENTION = registry.Stays(CROSS)


class Replaced(NamedTuple):
    """What a replacement remembers of the module whose place it took, and with which config.

    A layer whose heads are sharded has a config of its share; this one is of the whole. ``given`` are the adapters
    that came with the swap: those modules count as places for as long as anything is replaced. ``window`` is the
    host's, beyond which its masks hide everything. ``dtype`` is the layer's at the swap: a model that has another one
    since was cast, and its original is to be, too.
    """

    adapter: registry.Adapter
    layer: AttentionLayer
    config: HyperConfig
    original: nn.Module | None
    given: Mapping[registry.Which, registry.Adapter]
    window: int | None
    dtype: torch.dtype

    @property
    def config_now(self) -> HyperConfig:
        """With as many lags as the layer knows now: it may have been extended or resized, alone or in its model."""
        return replace(self.config, max_lag=self.layer.config.max_lag)


def _replaced(module: nn.Module) -> Replaced | None:
    found: Replaced | None = module.__dict__.get(_MARK)
    return found


class Site(NamedTuple):
    """An attention module that is known, under all the names it has in the model."""

    names: list[str]
    module: nn.Module
    adapter: registry.Adapter

    @property
    def was(self) -> str:
        return type(self.module).__name__

    @property
    def replaced(self) -> Replaced | None:
        return _replaced(self.module)

    def put(self, model: nn.Module, module: nn.Module) -> None:
        """Let ``module`` take this place in ``model``, under all its names."""
        for name in self.names:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module)

    def mark(
        self,
        replacement: nn.Module,
        layer: AttentionLayer,
        given: Mapping[registry.Which, registry.Adapter],
        window: int | None,
        *,
        keep_original: bool,
    ) -> None:
        """Note in ``replacement`` whose place it takes."""
        original = self.module if keep_original else None
        # a tuple, so that the original is no submodule: its parameters are not the model's any more
        dtype = layer.v_proj.weight.dtype
        seen = Replaced(self.adapter, layer, layer.config, original, given, window, dtype)
        setattr(replacement, _MARK, seen)


def find_sites(
    model: nn.Module, given: Mapping[registry.Which, registry.Adapter] | None = None
) -> tuple[list[Site], list[Left]]:
    """Attention modules that can be or have been replaced, in order, and those left alone.

    Args:
        model: where to look.
        given: adapters that count before those that are registered; those of an earlier swap count besides.
    """
    given = {**given_before(model), **(given or {})}
    sites: dict[int, Site] = {}
    left: list[Left] = []
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=False):
        if inside and name.startswith(inside):
            continue
        replaced = _replaced(module)
        adapter = replaced.adapter if replaced else registry.find(module, given)
        if adapter is None:
            continue
        if name == "":
            raise ValueError(f"the model is itself a {type(module).__name__}: give the model that holds it")
        adapter = adapter if replaced else adapter.at(model, name)
        inside += (f"{name}.",)
        reason = None if replaced else adapter.skip(module)
        if reason is not None:
            left.append(Left(name, type(module).__name__, reason))
        elif id(module) in sites:
            sites[id(module)].names.append(name)
        else:
            sites[id(module)] = Site([name], module, adapter)
    if not sites:
        raise ValueError(_unknown(model, left))
    return list(sites.values()), left + _without_adapter(model, inside)


def given_before(model: nn.Module) -> Mapping[registry.Which, registry.Adapter]:
    """The adapters that came with swaps of this model that still stand."""
    marks = filter(None, map(_replaced, model.modules()))
    return {which: adapter for mark in marks for which, adapter in mark.given.items()}


def replaced_sites(model: nn.Module) -> list[tuple[Site, Replaced]]:
    """The places where something has been replaced, with what is remembered of it."""
    sites = find_sites(model)[0] if holds_replacements(model) else []
    return [(site, site.replaced) for site in sites if site.replaced]


def swaps_in(model: nn.Module) -> list[dict[str, Any]]:
    """What stands in a model: places and config of each kind of layer, as :meth:`Adapter.finish` has it."""
    groups: dict[HyperConfig, list[int]] = {}
    for place, site in enumerate(find_sites(model)[0] if holds_replacements(model) else []):
        if site.replaced:
            groups.setdefault(site.replaced.config_now, []).append(place)
    return [{"layers": places, "config": config.to_dict()} for config, places in groups.items()]


def replaced_by(module: nn.Module) -> nn.Module | None:
    """The original whose place ``module`` took, if it is kept."""
    replaced = _replaced(module)
    return None if replaced is None else replaced.original


def holds_replacements(model: nn.Module) -> bool:
    """Whether anything in a model has been replaced."""
    return any(_MARK in module.__dict__ for module in model.modules())


def _without_adapter(model: nn.Module, known: tuple[str, ...]) -> list[Left]:
    """Modules that call themselves attention, have no adapter, and hold or are in none that has (``known``)."""
    left: list[Left] = []
    taken = known
    for name, module in model.named_modules():
        place = f"{name}."
        apart = name and not place.startswith(taken) and not any(other.startswith(place) for other in known)
        if apart and registry.calls_itself_attention(module):
            was = type(module).__name__
            left.append(Left(name, was, CROSS if "cross" in was.lower() else "no adapter is registered for its class"))
            taken += (place,)
    return left


def _unknown(model: nn.Module, left: list[Left]) -> str:
    modules = [module for module in model.modules() if not type(module).__module__.startswith("torch.nn")]
    seen = {registry.path_of(type(module)) for module in modules}
    attention = {registry.path_of(type(module)) for module in modules if registry.calls_itself_attention(module)}
    skipped = "".join(f" {entry.name} ({entry.was}) is left alone: {entry.reason}." for entry in left)
    return (
        f"no attention of {type(model).__name__} is known.{skipped} "
        f"Classes seen: {', '.join(sorted(attention or seen)) or 'those of torch.nn alone'}. "
        f"Known: {', '.join(registry.known_classes())}. "
        "Register an adapter: subclass hypermlp.integrations.Adapter, say in describe() what the module is, "
        "and call hypermlp.integrations.register(MyAdapter(), ItsClass), or swap_attention(model, "
        "adapter={ItsClass: MyAdapter()})"
    )
