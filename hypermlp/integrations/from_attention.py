"""Starting a layer from the softmax attention it replaces."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hypermlp.config import HyperConfig
from hypermlp.integrations.host import Host, Projection, Projections
from hypermlp.layers import AttentionLayer, HyperMLP


def fields_from_attention(host: Host, options: dict[str, Any]) -> dict[str, Any]:
    """``options`` with what reusing the host's weights fixes; ValueError where they differ."""
    if host.projections is None:
        why = f" ({host.not_offered})" if host.not_offered else ""
        raise ValueError(f"init='from_attention' is not offered for this host{why}: use init='fresh'")
    p = host.projections()
    heads, width = p.query.weight.shape[:2]
    parts = (p.query, p.key, p.value)
    biased = any(part.bias is not None for part in parts) or (p.output is not None and p.output[1] is not None)
    fixed = {"num_heads": heads, "v_dim": heads * p.value.weight.shape[1]}
    for name, value in fixed.items():
        if options.get(name, value) != value:
            raise ValueError(
                f"{name}={options[name]} does not fit init='from_attention', which keeps the host's {value}: "
                "leave it out or use init='fresh'"
            )
    if biased and not options.get("bias", True):
        raise ValueError("bias=False does not fit init='from_attention': the host's projections have biases")
    fields: dict[str, Any] = options | fixed | {"bias": biased or options.get("bias", False)}
    if options["mixer"] in ("relu", "softmax") and options.get("qk_dim") is None:
        fields["qk_dim"] = heads * width
    if "rope" not in options and host.rope_theta is not None:
        made = HyperConfig(hidden_size=host.hidden_size, **fields)
        if _has_pairs(width, made.qk_width):
            fields |= {"rope": True, "rope_theta": options.get("rope_theta", host.rope_theta)}
    return fields


@torch.no_grad()
def start_from_attention(layer: AttentionLayer, host: Host) -> None:
    """Give ``layer`` the host's value and output projections and what fits of its queries and keys.

    Sequence mixing and convolutions start as the identity and gates as constants, which the output
    projection makes up for: all of them can learn from there.
    """
    assert host.projections is not None
    p = host.projections()
    config = layer.config
    _neutral(layer)
    # a softmax layer divides by sqrt(K) itself
    scale = p.scaling * (config.qk_width**0.5 if config.mixer == "softmax" else 1.0)
    query, key = _leading(p, config, scale / _resting(config, config.q_gate))
    value = p.value.expanded(config.num_heads)
    resting = _resting(config, config.output_gate)
    for linear, part in ((layer.q_proj, query), (layer.k_proj, key), (layer.v_proj, value)):
        _copy(linear, *part.each(lambda x: x.flatten(0, 1)))
    if p.output is not None:
        weight, bias = p.output
        _copy(layer.o_proj, weight / resting, bias)
    else:
        for parameter in layer.v_proj.parameters():
            parameter.div_(resting)


def _leading(p: Projections, config: HyperConfig, scale: float) -> tuple[Projection, Projection]:
    """Queries and keys of every score map: the leading part of the host's head."""
    index = _channels(p.query.weight.shape[1], config).to(p.query.weight.device)
    query = p.query.each(lambda x: torch.cat([x[:, index] * scale] * config.num_maps))
    return query, p.key.expanded(config.num_heads).each(lambda x: torch.cat([x[:, index]] * config.num_maps))


def _channels(width: int, config: HyperConfig) -> Tensor:
    """Which of a head's ``width`` channels a score map keeps, in its order.

    Rotated channels come in pairs ``(c, c + width / 2)`` of falling frequency. Pairs evenly spaced are
    those that the narrower layer's own frequencies belong to.
    """
    kept = config.qk_width
    if config.rope and _has_pairs(width, kept):
        first = torch.arange(kept // 2) * (width // kept)
        return torch.cat((first, first + width // 2))
    if kept > width:
        raise ValueError(
            f"qk_dim={config.qk_dim} gives score maps of {kept} channels and the host's heads have {width}"
        )
    return torch.arange(kept)


def _has_pairs(width: int, kept: int) -> bool:
    return kept % 2 == 0 and width % kept == 0


def _copy(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    linear.weight.copy_(weight)
    if linear.bias is not None:
        linear.bias.zero_()
        if bias is not None:
            linear.bias.copy_(bias)


def _neutral(layer: AttentionLayer) -> None:
    """Convolutions and mixings as the identity, gates constant."""
    for conv in (layer.k_conv, layer.v_conv):
        if conv is not None:
            conv.weight.zero_()
            conv.weight[:, -1] = 1
    if isinstance(layer, HyperMLP):
        for mix in (layer.routing_mix, layer.readout_mix):
            if mix is not None and mix.up is not None:
                mix.up.zero_()  # down stays random: a product of two zeros would never learn
    if layer.gate is not None:
        rows = sum(layer.gate.widths[:2])  # those of queries and output; the mixings' cores multiply zeros
        layer.gate.proj.weight[:rows] = 0
        layer.gate.proj.bias[:rows] = 0.0 if layer.config.gate_activation == "sigmoid" else 1.0


def _resting(config: HyperConfig, gated: bool) -> float:
    """What :func:`_neutral` makes a gate multiply by."""
    return 0.5 if gated and config.gate_activation == "sigmoid" else 1.0
