"""Tensor parallelism of attention layers: every process of a group has some of the heads.

Heads only meet in the output projection, so each process computes its own from the whole input, and
the outputs are summed: one all-reduce of ``[B, T, hidden_size]`` forward, and one backward, of the
input's gradient. What every process holds whole but uses for its heads alone (the convolutions'
taps) has its gradient summed too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from hypermlp.config import HyperConfig
from hypermlp.layers import AttentionLayer
from hypermlp.layers.sequence_mixing import LagMixing
from hypermlp.layers.short_conv import ShortConv

_WHOLE = frozenset({"k_conv.weight", "v_conv.weight", "o_proj.bias"})


def shard_heads(module: nn.Module, group: DeviceMesh | dist.ProcessGroup | None = None) -> None:
    """Keep, in place and in every attention layer of ``module``, this process's heads alone.

    A collective call: all processes of the group make it, with the same module, and from then on
    run it on the same inputs (and, with dropout or sampling, the same seed). Outputs and the
    gradients of inputs are then those of the whole layers, on every process; gradients of parameters
    are this process's part of them, without any scaling. Caches hold this process's heads.

    The layers' weights are those of the group's first process. The rest of the model is left alone and
    must be the same on all. Call it after weights are loaded, and before an optimizer, DDP or
    FSDP take the parameters; those two then go over other processes than ``group``. Clip gradients
    by :func:`clip_grad_norm_`, and save :func:`full_state_dict`.

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
    group = _process_group(group)
    layers = list(_attention_layers(module))
    if not layers:
        raise ValueError(f"{type(module).__name__} has no attention layer of hypermlp: swap or build them first")
    for name, layer in layers:
        _check(name or type(layer).__name__, layer, group)
    for _, layer in layers:
        _shard(layer, group)


def full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """``module.state_dict()`` as if :func:`shard_heads` had not been called: what to save.

    A collective call of all processes of the group; each gets the whole. It loads into a module that
    is not sharded.
    """
    state: dict[str, Tensor] = module.state_dict()
    for name, layer in _attention_layers(module):
        if isinstance(layer.o_proj, _SummedLinear):
            for key, cut in _cuts(layer.config).items():
                path = f"{name}.{key}" if name else key
                if path in state:
                    state[path] = cut.gathered(state[path], layer.o_proj.group.processes)
    return state


def clip_grad_norm_(module: nn.Module, max_norm: float) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` over a module of which heads are sharded, with the norm of the whole.

    PyTorch's own would take a norm of this process's part alone, and what the processes hold in common
    would drift apart. A collective call of all processes of the group.

    Args:
        module: the model; without sharded layers the result is PyTorch's.
        max_norm: largest Euclidean norm of all gradients together.

    Returns:
        The norm before it is clipped, the same on every process.
    """
    groups: dict[dist.ProcessGroup, list[Tensor]] = {}
    shares: set[nn.Parameter] = set()
    for _, layer in _attention_layers(module):
        if isinstance(layer.o_proj, _SummedLinear):
            cut = [parameter for key, parameter in layer.named_parameters() if key not in _WHOLE]
            shares.update(cut)
            groups.setdefault(layer.o_proj.group.processes, []).extend(_gradients(cut))
    total = get_total_norm(_gradients(p for p in module.parameters() if p not in shares)).square()
    for group, gradients in groups.items():
        if gradients:
            square = get_total_norm(gradients).square()
            dist.all_reduce(square, group=group)
            total = square + total
    norm = total.sqrt()
    clip_grads_with_norm_(module.parameters(), max_norm, norm)
    return norm


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


class _Sum(torch.autograd.Function):
    """The sum over the group, taken of the values or else of their gradient; the other of the two is left as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, of_values: bool) -> Tensor:
        ctx.group, ctx.of_values = group, of_values
        if not of_values:
            return x.view_as(x)
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Sum.apply(grad, ctx.group, not ctx.of_values), None, None  # type: ignore[no-untyped-call]


def _copied(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``x``; its gradient is summed over ``group``: enters what differs by process."""
    return cast(Tensor, _Sum.apply(x, group, False))  # type: ignore[no-untyped-call]


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``x`` summed over ``group``; its gradient is left as it is: leaves what differs by process."""
    return cast(Tensor, _Sum.apply(x, group, True))  # type: ignore[no-untyped-call]


class _Group(NamedTuple):
    """The processes of a sharded layer. A copy of the layer, such as a moving average, shares them."""

    processes: dist.ProcessGroup

    def __deepcopy__(self, memo: dict[int, Any]) -> _Group:
        return self


class _SummedLinear(nn.Module):
    """Output projection of some heads, summed over the group; the bias is added once.

    No ``nn.Linear``, so that what wraps those (LoRA) refuses it: an adapter here would miss the sum.
    """

    def __init__(self, linear: nn.Linear, group: _Group) -> None:
        super().__init__()
        self.weight, self.bias, self.group = linear.weight, linear.bias, group

    def forward(self, x: Tensor) -> Tensor:
        out = _summed(F.linear(x, self.weight), self.group.processes)
        return out if self.bias is None else out + self.bias.to(out.dtype)  # autocast does not see a sum

    def reset_parameters(self) -> None:
        raise RuntimeError("a sharded layer cannot start afresh: call reset_parameters before shard_heads")

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} of {self.weight.shape[1] * self.group.processes.size()}, {self.weight.shape[0]}"


class _CopiedConv(ShortConv):
    """A convolution that every process holds whole and uses for its own heads."""

    group: _Group

    @classmethod
    def of(cls, conv: ShortConv, group: _Group) -> _CopiedConv:
        new = cls(conv.channels, conv.size, identity=conv.identity, device="meta")
        new.weight, new.group = conv.weight, group
        return new.train(conv.training)

    @property
    def taps(self) -> Tensor:
        return _copied(self.weight, self.group.processes)


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


def _cuts(config: HyperConfig) -> dict[str, _Cut]:
    """Where heads lie in a layer's parameters: score maps come gate maps first, each with all heads."""
    heads, maps = config.num_heads, config.num_maps
    scores, values = [config.qk_dim // maps] * maps, [config.v_dim]
    gates = [width // n for width, n in zip(config.gate_widths, (maps, 1, maps, 1), strict=True) for _ in range(n)]
    linears = {"q_proj": scores, "k_proj": scores, "v_proj": values, "gate.proj": gates}
    mixings = {"routing_mix": [heads] * maps, "readout_mix": [heads]}
    cuts = {f"{name}.{part}": _Cut(0, at) for name, at in linears.items() for part in ("weight", "bias")}
    cuts |= {f"{name}.{part}": _Cut(0, at) for name, at in mixings.items() for part in ("diag", "down", "up")}
    return cuts | {"o_proj.weight": _Cut(1, values)}


def _process_group(group: DeviceMesh | dist.ProcessGroup | None) -> dist.ProcessGroup:
    if group is None:
        if not dist.is_initialized():
            raise ValueError("there is no process group: call torch.distributed.init_process_group first")
        return cast(dist.ProcessGroup, dist.group.WORLD)
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"group must be a mesh of one dimension, got {group.ndim}: choose one, such as mesh['tp']")
        return group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a DeviceMesh, a ProcessGroup or None, got {type(group).__name__}")
    return group


def _attention_layers(module: nn.Module) -> Iterator[tuple[str, AttentionLayer]]:
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, AttentionLayer))


def _check(name: str, layer: AttentionLayer, group: dist.ProcessGroup) -> None:
    if isinstance(layer.o_proj, _SummedLinear):
        raise ValueError(f"{name} is sharded already")
    heads, world = layer.config.num_heads, group.size()
    if heads % world:
        raise ValueError(
            f"num_heads={heads} of {name} does not divide over {world} processes: "
            f"build it with num_heads a multiple of {world}, or take a group whose size divides {heads}"
        )
    parameters = dict(layer.named_parameters())
    if unknown := sorted(parameters.keys() - _cuts(layer.config).keys() - _WHOLE):
        raise ValueError(f"{name} has parameters that shard_heads does not know, {unknown}: shard it before adding any")
    for key, parameter in parameters.items():
        if type(parameter) is not nn.Parameter or parameter.is_meta:
            kind = "on the meta device" if parameter.is_meta else f"a {type(parameter).__name__}"
            raise ValueError(f"{name}.{key} is {kind}: shard heads when weights are loaded, and before FSDP")


@torch.no_grad()
def _shard(layer: AttentionLayer, group: dist.ProcessGroup) -> None:
    cuts = _cuts(layer.config)
    for key, parameter in list(layer.named_parameters()):
        whole = parameter.clone(memory_format=torch.contiguous_format)
        dist.broadcast(whole, dist.get_global_rank(group, 0), group=group)
        if key in _WHOLE:
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
    cast(Any, layer).o_proj = _SummedLinear(layer.o_proj, _Group(group))
    for name in ("k_conv", "v_conv"):
        conv = getattr(layer, name)
        if conv is not None:
            setattr(layer, name, _CopiedConv.of(conv, _Group(group)))
    layer.register_forward_pre_hook(partial(_enter, _Group(group)), with_kwargs=True)


def _enter(
    group: _Group, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The hidden states of a call, with the sum of their gradients."""
    x = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(x, Tensor):  # the layer says what is wrong
        return args, kwargs
    x = _copied(x, group.processes)
    return ((x, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": x})
