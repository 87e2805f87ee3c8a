"""The whole of a model of which heads are sharded: its weights to save, and the norm of its gradients.

Both hold beside FSDP2, whose parameters are spread over a device mesh of their own.
"""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from hypermlp.checks import check_kind
from hypermlp.distributed.groups import attention_layers
from hypermlp.distributed.heads import WHOLE, SummedLinear, cuts_of


def full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """``module.state_dict()`` as if neither :func:`shard_heads` nor FSDP2 had been called: what to save.

    A collective call of all processes of all groups; each gets the whole. It loads into a module that
    is not sharded. What FSDP2 spread comes whole, too, a parameter at a time.
    """
    check_kind("module", module, nn.Module)
    state = {key: _whole(x) for key, x in module.state_dict().items()}
    for name, layer in attention_layers(module):
        if isinstance(layer.o_proj, SummedLinear):
            for key, cut in cuts_of(layer.config).items():
                path = f"{name}.{key}" if name else key
                if path in state:
                    state[path] = cut.gathered(state[path], layer.o_proj.group.processes)
    return state


def clip_grad_norm_(module: nn.Module, max_norm: float) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` over a module of which heads are sharded, with the norm of the whole.

    PyTorch's own would take a norm of this process's part alone, and what the processes hold in common
    would drift apart. A collective call of all processes of all groups, those of FSDP2 too.

    Args:
        module: the model; without sharded layers the result is PyTorch's.
        max_norm: largest Euclidean norm of all gradients together.

    Returns:
        The norm before it is clipped, the same on every process.
    """
    if not isinstance(max_norm, (Real, Tensor)) or isinstance(max_norm, bool):
        raise TypeError(f"max_norm must be a number, got {max_norm!r}; float('inf') clips nothing")
    groups: dict[dist.ProcessGroup, list[nn.Parameter]] = {}
    shares: set[nn.Parameter] = set()
    for _, layer in attention_layers(module):
        if isinstance(layer.o_proj, SummedLinear):
            cut = [parameter for key, parameter in layer.named_parameters() if key not in WHOLE]
            shares.update(cut)
            groups.setdefault(layer.o_proj.group.processes, []).extend(cut)
    total = _square(p for p in module.parameters() if p not in shares)
    for group, cut in groups.items():
        if any(parameter.grad is not None for parameter in cut):
            square = _square(cut)
            dist.all_reduce(square, group=group)
            total = square + total
    norm = total.sqrt()
    for parameters in _by_mesh(module.parameters()).values():
        clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def _whole(x: Tensor) -> Tensor:
    """All of what FSDP2 spread over processes."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def _by_mesh(parameters: Iterable[nn.Parameter]) -> dict[DeviceMesh | None, list[nn.Parameter]]:
    """Those that have a gradient, apart by the mesh that it is spread over: PyTorch takes norms of one at a time."""
    found: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            found.setdefault(mesh, []).append(parameter)
    return found


def _square(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The square of the norm of their gradients."""
    norms = [get_total_norm([p.grad for p in part if p.grad is not None]) for part in _by_mesh(parameters).values()]
    return torch.stack([_whole(norm).square() for norm in norms]).sum() if norms else torch.zeros(())
