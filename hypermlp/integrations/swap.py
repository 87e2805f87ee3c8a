"""``swap_attention``: hyper layers in the place of a model's own attention, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal, cast, get_args

import torch
from torch import nn

from hypermlp.checks import as_flag, check_choice, check_kind, check_names, integer, shown
from hypermlp.config import HyperConfig, HyperFields, Mixer
from hypermlp.integrations.from_attention import fields_from_attention, start_from_attention
from hypermlp.integrations.hooks import hooks_left, return_hooks, share_hooks
from hypermlp.integrations.host import Host, NoProjection, common_dtype, placement, weights_away
from hypermlp.integrations.quantised import with_plain_weights
from hypermlp.integrations.registry import Adapter, Which, as_mapping
from hypermlp.integrations.sites import Site, find_sites, replaced_sites, swaps_in
from hypermlp.integrations.swap_report import Left, Swapped, SwapReport
from hypermlp.layers import AttentionLayer, build_layer
from hypermlp.layers.projection import Projection
from hypermlp.ops.attention import Backend, check_backend

Init = Literal["fresh", "from_attention"]

# tables of more lags would outgrow the projections; a longer context is a window
_MOST_LAGS = 2048
_MOST_POSITIONS = 8192
_FROM_HOST = ("hidden_size", "mixer", "layer_idx", "device", "dtype")
_KEYWORDS = (
    "mixer",
    "layers",
    "init",
    "keep_originals",
    "adapter",
    "backend",
    "num_heads",
    *HyperFields.__annotations__,
)


def swap_attention(
    model: nn.Module,
    mixer: Mixer = "hyperglu",
    layers: Iterable[int] | None = None,
    init: Init = "fresh",
    *,
    keep_originals: bool = True,
    adapter: Adapter | Mapping[Which, Adapter] | None = None,
    **options: Any,
) -> SwapReport:
    """Replace the attention of a model by hyper layers, in place. An error changes nothing.

    Replacements take over device, dtype, training mode, ``layer_idx`` and hooks on the calls of the
    modules they replace. Their parameters are new, so make the optimiser afterwards.

    Args:
        model: a model with attention modules that are known, see :func:`register`.
        mixer: ``"hyperglu"``, ``"hypermlp"``, or the baselines ``"relu"`` and ``"softmax"``.
        layers: which attention modules, counted from 0 in the model's order, negative ones from
            the end; None for all.
        init: ``"fresh"``, or ``"from_attention"``: value and output projections are the host's,
            query and key projections its leading part, everything else starts neutral. There is
            still no softmax, so the model does not compute what it did; it starts nearer to it.
        keep_originals: keep the replaced modules for :func:`restore_attention`; False frees them.
        adapter: how modules are read that are not known, for this model alone: ``{module: adapter}``,
            modules named as for :func:`register`, or one adapter for all whose class has attention in its name
            (of nested ones the outer).
        options: fields of :class:`~hypermlp.HyperConfig`, and ``backend``. ``causal`` only where the
            model leaves it to masks (``torch.nn.MultiheadAttention``). ``max_lag`` is by default
            what the model can see, at most 2048 where attention is causal.

    Returns:
        What was replaced, what was left and why, and the parameters before and after.

    Raises:
        ValueError: no attention that is known (naming the classes seen and how to register one),
            a layer that does not exist or is swapped already, options that do not fit, a ``max_lag`` that
            the model does not tell.
    """
    check_choice("init", init, get_args(Init))
    keep_originals = as_flag("keep_originals", keep_originals)
    for name in _FROM_HOST:
        if name in options:
            raise ValueError(f"{name} is taken from the model: leave it out")
    check_names("swap_attention", options, _KEYWORDS)
    backend = options.pop("backend", "auto")
    check_backend(backend)
    _check_unwrapped(model)
    before = _count(model)
    given = as_mapping(adapter)
    sites, left = find_sites(model, given)
    chosen = _chosen(layers, sites)
    plain = common_dtype(model)
    built = [(site, *_replacement(site, mixer, init, options, backend, plain)) for site in chosen]
    hooks: list[Left] = []
    for site, layer, new, host in built:
        hooks += hooks_left(site.module, site.names[0], new, shared=share_hooks(site.module, new))
        site.mark(new, layer, given, host.window, keep_original=keep_originals)
        site.put(model, new.train(site.module.training))
    try:
        tell_adapters(model)
    except Exception:
        for site in chosen:
            site.put(model, site.module)
        with suppress(Exception):  # of several adapters some may have been told already
            tell_adapters(model, [site.adapter for site in chosen])
        raise
    swapped = tuple(
        Swapped(site.names[0], site.was, layer, _gone(site.module, new), host.differences)
        for site, layer, new, host in built
    )
    names = {s.name for s in swapped}
    left += [
        Left(site.names[0], site.was, "swapped before" if site.replaced else "not among layers")
        for site in sites
        if site.names[0] not in names
    ]
    return SwapReport(swapped, tuple(left), before, _count(model), tuple(hooks))


def restore_attention(model: nn.Module) -> tuple[str, ...]:
    """Put the modules back that :func:`swap_attention` replaced, the very same objects.

    They follow the model where it has been moved, cast or switched between training and
    evaluation since. What the hyper layers learned is dropped.

    Returns:
        Names of the modules put back.

    Raises:
        ValueError: if none was replaced, or one without ``keep_originals`` or in a model that was opened
            from a saved one, or their weights are offloaded or sharded; nothing changes.
    """
    _check_unwrapped(model)
    sites = replaced_sites(model)
    if not sites:
        raise ValueError("no attention of this model has been swapped: there is nothing to restore")
    if lost := [site.names[0] for site, known in sites if known.original is None]:
        raise ValueError(
            f"there are no originals of {lost}: a saved model holds none, nor does one swapped with "
            "keep_originals=False; load the model as it was before the swap"
        )
    for site, _ in sites:
        if away := weights_away(site.module):
            raise ValueError(f"{site.names[0]} ({site.was}): {away}")
    for site, known in sites:
        assert known.original is not None
        weight = known.layer.v_proj.weight
        return_hooks(site.module, known.original)
        # one of several dtypes keeps them, unless the model was cast since
        cast = None if weight.dtype == known.dtype else weight.dtype
        site.put(model, known.original.to(weight.device, cast).train(site.module.training))
    tell_adapters(model, [known.adapter for _, known in sites])
    return tuple(site.names[0] for site, _ in sites)


def swapped_layers(model: nn.Module) -> dict[str, AttentionLayer]:
    """The hyper layers that stand in a model, by the name of the module they belong to."""
    return {site.names[0]: known.layer for site, known in replaced_sites(model)}


def _check_unwrapped(model: nn.Module) -> None:
    """DistributedDataParallel averages the gradients of the parameters that it was made with, and of no others."""
    check_kind("model", model, nn.Module)
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise ValueError("model is in DistributedDataParallel, which would not see new parameters: wrap it afterwards")


def _chosen(layers: Iterable[int] | None, sites: list[Site]) -> list[Site]:
    if layers is None:
        chosen = [site for site in sites if not site.replaced]
        if not chosen:
            raise ValueError("all attention of this model is swapped already: restore_attention(model) first")
        return chosen
    if isinstance(layers, int):
        raise TypeError(f"layers must be several places, got {layers!r}: write layers=[{layers!r}]")
    if not isinstance(layers, Iterable):
        raise TypeError(f"layers must be several places or None, got {type(layers).__name__}")
    places: set[int] = set()
    for place in layers:
        number = integer(place)
        if number is None or not -len(sites) <= number < len(sites):
            raise ValueError(f"layers must be among 0 to {len(sites) - 1} for this model, got {shown(place)}")
        places.add(number % len(sites))
    chosen = [sites[place] for place in sorted(places)]
    if not chosen:
        raise ValueError("layers is empty: name at least one, or leave it out for all")
    if again := [site.names[0] for site in chosen if site.replaced]:
        raise ValueError(f"{again} are swapped already: restore_attention(model) first, or choose other layers")
    return chosen


def _replacement(
    site: Site, mixer: Mixer, init: Init, options: dict[str, Any], backend: Backend, dtype: torch.dtype
) -> tuple[AttentionLayer, nn.Module, Host]:
    """The new layer, what takes the module's place, and what that was; ValueError with the module's name."""
    try:
        module = with_plain_weights(site.module, dtype)
        host = site.adapter.describe(module)
        device, dtype = placement(module)
        config = _config(host, mixer, init, options)
        layer = build_layer(config, backend=backend, layer_idx=host.layer_idx, device=device, dtype=dtype)
        if not host.output_projection:
            layer.o_proj = cast(Projection, NoProjection())
        if init == "from_attention":
            start_from_attention(layer, host)
        return layer, site.adapter.wrap(layer, site.module, host), host
    except (ValueError, TypeError) as error:
        raise type(error)(f"{site.names[0]} ({site.was}): {error}") from error
    except AttributeError as error:
        raise ValueError(f"{site.names[0]} is not the {site.was} that its adapter knows: {error}") from error


def _config(host: Host, mixer: Mixer, init: Init, options: dict[str, Any]) -> HyperConfig:
    if "causal" in options and not host.either_way:
        raise ValueError("causal is taken from the model: leave it out")
    fields = {"mixer": mixer, "causal": host.causal, **options}
    longest = fields.pop("max_lag", None)
    if init == "from_attention":
        fields = fields_from_attention(host, fields)
    if not host.output_projection and fields.get("v_dim", host.hidden_size) != host.hidden_size:
        raise ValueError(
            f"v_dim={fields['v_dim']}: this module has no output projection, "
            f"so v_dim must be its width {host.hidden_size}"
        )
    # all other options are checked before a length is asked for
    config = HyperConfig(hidden_size=host.hidden_size, **fields)
    if longest is None:
        longest = _table_rows(host, config.causal) if mixer in ("hyperglu", "hypermlp") else host.window
    elif host.window is not None and longest > host.window:
        raise ValueError(
            f"max_lag={longest} is longer than the host's sliding window of {host.window}: "
            "its masks hide what is further back; leave max_lag out or make it shorter"
        )
    return replace(config, max_lag=longest)


def _table_rows(host: Host, causal: bool) -> int:
    rows = host.max_length
    if causal and host.window is not None:
        return min(host.window, _MOST_LAGS, rows or _MOST_LAGS)
    if rows is None:
        raise ValueError(
            "max_lag is missing, and this model does not say how many tokens it sees: pass max_lag=the longest "
            "sequence you use (tables have a row for each token)"
        )
    if causal:
        return min(rows, _MOST_LAGS)
    if rows > _MOST_POSITIONS:
        raise ValueError(
            f"max_lag is missing: this layer is bidirectional, with a row for each token, and the model sees "
            f"{rows:,}: pass max_lag=the longest sequence you use"
        )
    return rows


def _gone(module: nn.Module, replacement: nn.Module) -> tuple[str, ...]:
    """Names of the parameters that ``module`` has and ``replacement`` has not."""
    kept = {id(parameter) for parameter in replacement.parameters()}
    return tuple(name for name, parameter in module.named_parameters() if id(parameter) not in kept)


def tell_adapters(model: nn.Module, adapters: Iterable[Adapter] = ()) -> None:
    """Tell ``adapters``, and those of what stands in the model now, what that is; nothing for a model without."""
    swaps, standing = swaps_in(model), (known.adapter for _, known in replaced_sites(model))
    for adapter in {id(adapter): adapter for adapter in (*adapters, *standing)}.values():
        adapter.finish(model, swaps)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
