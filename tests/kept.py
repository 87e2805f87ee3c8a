"""What a forward leaves for its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks


def kept_bytes(module: nn.Module, *inputs: Any, **kwargs: Any) -> int:
    """Bytes of all memory that ``module(*inputs)`` saves for its backward, each piece once, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    found: dict[int, torch.UntypedStorage] = {}  # held, so that no memory is given out twice

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        module(*inputs, **kwargs)
    return sum(storage.nbytes() for storage in found.values())
