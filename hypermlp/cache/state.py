"""What a layer's cache is saved as, and whether saved tensors are that."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hypermlp.cache.spec import CacheSpec

_INTEGERS = (torch.int64, torch.int32)


def refuse_gradients(q: Tensor) -> None:
    """RuntimeError where the tokens with queries ``q`` would be taken in and differentiated."""
    if torch.is_grad_enabled() and q.requires_grad:
        raise RuntimeError("cache= is for inference: call under torch.no_grad() or torch.inference_mode()")


def check_state(spec: CacheSpec, tensors: Mapping[str, Tensor], max_length: int | None) -> int:
    """Whether one layer's saved tensors fit ``spec`` and each other; how many tokens they are of.

    A state has ``length``, how many tokens there have been; where rows begin, ``start`` ``[B]``; and of the
    newest ``n`` tokens, beginning with number ``<name>.oldest``: ``keys`` ``[B, S*H, n, K]``, ``values``
    ``[B, H, n, V]``, ``inputs`` ``[B, n, D]`` for convolutions and ``valid`` ``[B, n, 1]`` if some do not count.

    Raises:
        ValueError: they do not.
    """
    length = _integer(tensors, "length")
    if max_length is not None and length > max_length:
        raise ValueError(f"state_dict holds {length} tokens and the cache takes {max_length}: give a larger max_length")
    if not length:
        return 0
    batch = tensors["keys"].shape[0] if "keys" in tensors and tensors["keys"].ndim else 0
    heads = {"keys": (spec.key_heads, spec.key_width), "values": (spec.value_heads, spec.value_width)}
    sizes: dict[str, tuple[int, ...]] = {name: (batch, number, -1, width) for name, (number, width) in heads.items()}
    if spec.taps:
        sizes["inputs"] = (batch, -1, spec.hidden_size)
    if "valid" in tensors:
        sizes["valid"] = (batch, -1, 1)
    names = {"length", *sizes, *(f"{name}.oldest" for name in sizes)}
    missing, unknown = sorted(names - set(tensors)), sorted(set(tensors) - names - {"start"})
    if missing or unknown:
        raise ValueError(f"state_dict is of another layer or version: it lacks {missing}, and {unknown} are not known")
    for name, size in sizes.items():
        _check_part(spec, name, tensors, length, size)
    start = tensors.get("start")
    if start is not None and (
        start.dtype not in _INTEGERS or start.shape != (batch,) or bool(((start < 0) | (start > length)).any())
    ):
        raise ValueError(f"state_dict's start must be {batch} integers from 0 to {length}, got {start}")
    return length


def _check_part(spec: CacheSpec, name: str, tensors: Mapping[str, Tensor], length: int, size: tuple[int, ...]) -> None:
    part, oldest = tensors[name], _integer(tensors, f"{name}.oldest")
    # what the next token reads: everything without a window
    reach = spec.taps if name == "inputs" else length if spec.window is None else spec.window - 1
    if oldest > max(0, length - reach):
        raise ValueError(f"state_dict's {name} begin with token {oldest}: the next one reads {reach} of {length}")
    expected = tuple(length - oldest if entry < 0 else entry for entry in size)
    if tuple(part.shape) != expected:
        raise ValueError(
            f"state_dict's {name} must be {expected} for tokens {oldest} to {length}, got {tuple(part.shape)}"
        )
    if (part.dtype == torch.bool) != (name == "valid") or (name != "valid" and not part.is_floating_point()):
        raise ValueError(f"state_dict's {name} cannot be {part.dtype}")
    keys = tensors["keys"]
    if part.device != keys.device or (name == "values" and part.dtype != keys.dtype):
        raise ValueError(
            f"state_dict's {name} are {part.dtype} on {part.device}, its keys {keys.dtype} on {keys.device}"
        )


def _integer(tensors: Mapping[str, Tensor], name: str) -> int:
    value = tensors.get(name)
    if value is None or value.dtype not in _INTEGERS or value.numel() != 1 or int(value) < 0:
        raise ValueError(f"state_dict's {name} must be one integer >= 0, got {value}")
    return int(value)
