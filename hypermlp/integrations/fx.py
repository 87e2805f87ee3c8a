"""``torch.fx``: a wrapper is one node of a traced model, as the attention of ``torch.nn`` is."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from torch import nn
from torch.fx import Proxy

Forward = TypeVar("Forward", bound=Callable[..., Any])


def one_node(forward: Forward) -> Forward:
    """A module's ``forward`` that tracers do not look into: it reads sizes and masks, which are not there then.

    Tracers take the modules of ``torch.nn`` so by themselves, and of others those that somebody lists
    (``leaf_modules`` of torchvision, ``register_notrace_module`` of timm).
    """

    @wraps(forward)
    def called(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        tracer: Any = next((value.tracer for value in given if isinstance(value, Proxy)), None)
        if tracer is None:
            return forward(self, *args, **kwargs)
        return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)

    return called  # type: ignore[return-value]
