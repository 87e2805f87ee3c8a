"""Tensor parallelism of attention layers: every process of a group has some of the heads.

Heads only meet in the output projection, so each process computes its own from the whole input, and
the outputs are summed: one all-reduce of ``[B, T, hidden_size]`` forward, and one backward, of the
input's gradient. What every process holds whole but uses for its heads alone (the convolutions'
taps) has its gradient summed too.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from hypermlp.config import HyperConfig
from hypermlp.distributed.groups import Group, copied, layers_to_shard, process_group, summed
from hypermlp.layers import AttentionLayer
from hypermlp.layers.sequence_mixing import LagMixing
from hypermlp.layers.short_conv import ShortConv

WHOLE = frozenset({"k_conv.weight", "v_conv.weight", "o_proj.bias"})


def shard_heads(module: nn.Module, group: DeviceMesh | dist.ProcessGroup | None = None) -> None:
    """Keep, in place and in every attention layer of ``module``, this process's heads alone.

    A collective call: all processes of the group make it, with the same module, and from then on
    run it on the same inputs (and, with dropout or sampling, the same seed). Outputs and the
    gradients of inputs are then those of the whole layers, on every process; gradients of parameters
    are this process's part of them, without any scaling. Caches hold this process's heads.

    The layers' weights are those of the group's first process. The rest of the model is left alone and
    must be the same on all. Call it after weights are loaded, and before an optimizer, DDP or
    FSDP take the parameters; those two then go over other processes than ``group``. Clip gradients
    by :func:`clip_grad_norm_`, and save :func:`full_state_dict`. A distributed checkpoint (DCP) of the model's
    own ``state_dict()`` is refused: it has one name for the heads of all processes, and would keep those of one.

    Args:
        module: an attention layer, or a model that has some, such as a swapped one.
        group: a one-dimensional device mesh or a process group; None for all processes.

    Raises:
        ValueError: if heads do not divide over the group, or a layer is sharded already, or holds
            parameters that are not its own (LoRA). Nothing is changed then.

    Example:
        >>> mesh = init_device_mesh("cuda", (dist.get_world_size(),))
        >>> swap_attention(model, num_heads=8)
        >>> shard_heads(model, mesh)
    """
    group = process_group(group)
    layers = layers_to_shard(module)
    for name, layer in layers.items():
        _check(name or type(layer).__name__, layer, group)
    for layer in layers.values():
        _shard(layer, group)


class SummedLinear(nn.Module):
    """Output projection of some heads, summed over the group; the bias is added once.

    No ``nn.Linear``, so that what wraps those (LoRA) refuses it: an adapter here would miss the sum.
    """

    def __init__(self, linear: nn.Linear, group: Group) -> None:
        super().__init__()
        self.weight, self.bias, self.group = linear.weight, linear.bias, group

    def forward(self, x: Tensor) -> Tensor:
        out = summed(F.linear(x, self.weight), self.group.processes)
        return out if self.bias is None else out + self.bias.to(out.dtype)  # autocast does not see a sum

    def reset_parameters(self) -> None:
        raise RuntimeError("a sharded layer cannot start afresh: call reset_parameters before shard_heads")

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} of {self.weight.shape[1] * self.group.processes.size()}, {self.weight.shape[0]}"


class CopiedConv(ShortConv):
    """A convolution that every process holds whole and uses for its own heads."""

    group: Group

    @classmethod
    def of(cls, conv: ShortConv, group: Group) -> CopiedConv:
        new = cls(conv.channels, conv.size, identity=conv.identity, device="meta")
        new.weight, new.group = conv.weight, group
        return new.train(conv.training)

    @property
    def taps(self) -> Tensor:
        return copied(self.weight, self.group.processes)


class _Cut(NamedTuple):
    """How a parameter is cut: along ``dim`` it is ``sections``, each of which runs over all heads."""

    dim: int
    sections: list[int]

    def part(self, whole: Tensor, group: dist.ProcessGroup) -> Tensor:
        """This process's share of every section."""
        rank, world = group.rank(), group.size()
        shares = [
            section.narrow(self.dim, rank * (size // world), size // world)
            for section, size in zip(torch.split(whole, self.sections, self.dim), self.sections, strict=True)
        ]
        return torch.cat(shares, self.dim)

    def gathered(self, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        """The parameter of which every process has ``part``; ``sections`` are those of the part."""
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(parts, part.contiguous(), group=group)
        sections = zip(*(torch.split(x, self.sections, self.dim) for x in parts), strict=True)
        return torch.cat([share for section in sections for share in section], self.dim)


def cuts_of(config: HyperConfig) -> dict[str, _Cut]:
    """Where heads lie in a layer's parameters: score maps come gate maps first, each with all heads."""
    heads, maps = config.num_heads, config.num_maps
    scores, values = [config.qk_dim // maps] * maps, [config.v_dim]
    gates = [width // n for width, n in zip(config.gate_widths, (maps, 1, maps, 1), strict=True) for _ in range(n)]
    linears = {"q_proj": scores, "k_proj": scores, "v_proj": values, "gate.proj": gates}
    mixings = {"routing_mix": [heads] * maps, "readout_mix": [heads]}
    cuts = {f"{name}.{part}": _Cut(0, at) for name, at in linears.items() for part in ("weight", "bias")}
    cuts |= {f"{name}.{part}": _Cut(0, at) for name, at in mixings.items() for part in ("diag", "down", "up")}
    return cuts | {"o_proj.weight": _Cut(1, values)}


def _check(name: str, layer: AttentionLayer, group: dist.ProcessGroup) -> None:
    if isinstance(layer.o_proj, SummedLinear):
        raise ValueError(f"{name} is sharded already")
    heads, world = layer.config.num_heads, group.size()
    if heads % world:
        raise ValueError(
            f"num_heads={heads} of {name} does not divide over {world} processes: "
            f"build it with num_heads a multiple of {world}, or take a group whose size divides {heads}"
        )
    parameters = dict(layer.named_parameters())
    if unknown := sorted(parameters.keys() - cuts_of(layer.config).keys() - WHOLE):
        raise ValueError(f"{name} has parameters that shard_heads does not know, {unknown}: shard it before adding any")
    for key, parameter in parameters.items():
        if type(parameter) is not nn.Parameter or parameter.is_meta:
            kind = "on the meta device" if parameter.is_meta else f"a {type(parameter).__name__}"
            raise ValueError(f"{name}.{key} is {kind}: shard heads when weights are loaded, and before FSDP")


@torch.no_grad()
def _shard(layer: AttentionLayer, group: dist.ProcessGroup) -> None:
    cuts = cuts_of(layer.config)
    for key, parameter in list(layer.named_parameters()):
        whole = parameter.clone(memory_format=torch.contiguous_format)
        dist.broadcast(whole, dist.get_global_rank(group, 0), group=group)
        if key in WHOLE:
            parameter.copy_(whole)
            continue
        owner, _, name = key.rpartition(".")
        share = nn.Parameter(cuts[key].part(whole, group), requires_grad=parameter.requires_grad)
        setattr(layer.get_submodule(owner), name, share)
    c = layer.config
    heads, world = c.num_heads, group.size()
    layer.config = replace(c, num_heads=heads // world, qk_dim=c.qk_dim // world, v_dim=c.v_dim // world)
    for part in layer.modules():
        if isinstance(part, nn.Linear):
            part.out_features, part.in_features = part.weight.shape
        elif isinstance(part, LagMixing):
            part.num_heads //= world
    if layer.gate is not None:
        layer.gate.widths = layer.config.gate_widths
    cast(Any, layer).o_proj = SummedLinear(layer.o_proj, Group(group))
    for name in ("k_conv", "v_conv"):
        conv = getattr(layer, name)
        if conv is not None:
            setattr(layer, name, CopiedConv.of(conv, Group(group)))
    layer.register_forward_pre_hook(partial(_enter, Group(group)), with_kwargs=True)
    layer.register_state_dict_post_hook(_keep_from_checkpoints)  # type: ignore[no-untyped-call]


def _enter(
    group: Group, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The hidden states of a call, with the sum of their gradients."""
    x = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(x, Tensor):  # the layer says what is wrong
        return args, kwargs
    x = copied(x, group.processes)
    return ((x, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": x})


def _keep_from_checkpoints(layer: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """Mark this process's part of weights, so that a distributed checkpoint does not take it for the whole.

    The mark is what DCP asks a value for first. Copies keep it; files do not.
    """
    for key in cuts_of(cast(AttentionLayer, layer).config):
        x = state.get(prefix + key)
        if isinstance(x, Tensor) and not isinstance(x, nn.Parameter):  # which a caller's keep_vars asks for
            x.__create_write_items__ = _refuse_checkpoint  # type: ignore[attr-defined]
            x.__getstate__ = dict  # type: ignore[method-assign]


def _refuse_checkpoint(*asked: Any) -> Any:
    raise RuntimeError(
        "a distributed checkpoint would keep the heads of one process alone, in the model's and in an optimizer's "
        "state: save full_state_dict(model), and load it into a model before shard_heads; keep the optimizer's state "
        "of each process in a file of its own (torch.save)"
    )
