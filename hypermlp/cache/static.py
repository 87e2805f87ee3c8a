"""One layer's part of a cache whose shapes never change: for ``torch.compile`` and CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hypermlp.cache.spec import CacheSpec
from hypermlp.cache.state import check_state
from hypermlp.checks import as_integer, check_kind
from hypermlp.ops.decode import Past
from hypermlp.ops.modes import values_readable


class StaticLayerCache:
    """Keys, values and recent hidden states in memory of one size, their count a tensor on the device.

    A step is the same sequence of operations whatever the length, so it compiles once and can be
    captured; it reads the whole capacity, though. Takes prompts through the first call and single
    tokens after it.

    Args:
        spec: sizes, see :class:`CacheSpec`; tables must be indexed by lag.
        max_length: tokens it takes at most; a window shorter than that makes it a ring.
    """

    def __init__(self, spec: CacheSpec, max_length: int) -> None:
        check_kind("spec", spec, CacheSpec, "CacheSpec.of(layer.config)")
        max_length = as_integer("max_length", max_length, 1)
        if not spec.by_lag:
            raise ValueError("a static cache needs layout='lag': use a growing cache for position-indexed tables")
        self.spec, self.max_length = spec, max_length
        self.capacity = min(max_length, spec.window or max_length)
        self.empty = True
        self._tensors: dict[str, Tensor] = {}

    @property
    def length(self) -> int:
        """Tokens so far; waits for the device."""
        return 0 if self.empty else int(self._tensors["length"])

    @property
    def known_length(self) -> int | None:
        """The same, or None where it cannot be read (:func:`~hypermlp.ops.modes.values_readable`)."""
        return self.length if self.empty or values_readable(self._tensors["length"], wait=True) else None

    @property
    def batch_size(self) -> int | None:
        return self._tensors["keys"].shape[0] if self._tensors else None

    @property
    def lengths(self) -> Tensor:
        return self.length - self._tensors["start"]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def offset(self, valid: Tensor | None) -> Tensor:
        """Number of the next token in its row, ``[B, 1]`` int64, counted from the row's first valid one."""
        return (self._tensors["length"] - self._tensors["start"])[:, None]

    def inputs(self, like: Tensor) -> Tensor | None:
        """The past hidden states that convolutions read, ``[B, taps, hidden_size]``."""
        if not self.spec.taps:
            return None
        if self.empty:
            return like.new_zeros(like.shape[0], self.spec.taps, like.shape[-1])
        return self._tensors["inputs"].clone()

    def window(self, x: Tensor) -> Tensor:
        """Take in one new token's hidden states ``[B, D]``; returns the newest, oldest first, ``[B, taps + 1, D]``."""
        if not self.spec.taps:
            return x[:, None]
        window = torch.cat((self._tensors["inputs"], x[:, None]), dim=1)
        self._tensors["inputs"].copy_(window[:, 1:])
        return window

    def check(self, q: Tensor, new: int) -> None:
        """Whether ``new`` tokens with queries ``[B, ...]`` may follow; an error changes nothing."""
        length = self.known_length
        if length is not None and length + new > self.max_length:
            raise ValueError(
                f"the cache holds {length} tokens and {new} more pass its {self.max_length}: "
                "make it with a larger max_length"
            )
        if self._tensors:
            keys = self._tensors["keys"]
            if (q.shape[0], q.dtype, q.device) != (keys.shape[0], keys.dtype, keys.device):
                raise ValueError(
                    f"the cache holds batch {keys.shape[0]}, {keys.dtype} on {keys.device} and got "
                    f"batch {q.shape[0]}, {q.dtype} on {q.device}: it keeps what it was made for"
                )

    def step(self, k: Tensor, v: Tensor, valid: Tensor | None) -> Past:
        """Take in the keys ``[B, S*H*K]`` and values ``[B, H*V]`` of the token given to :meth:`window`.

        ``valid`` is bool ``[B, 1]``. Returns what the token sees.
        """
        held = self._tensors
        slot = (held["length"] % self.capacity).reshape(1)
        now = torch.ones_like(held["valid"][:, :1]) if valid is None else valid
        held["valid"].index_copy_(1, slot, now)
        held["start"].add_(((held["start"] == held["length"]) & ~now[:, 0]).long())
        held["length"].add_(1)
        keys, values = held["keys"].flatten(0, 1), held["values"].flatten(0, 1)
        k = k.view(keys.shape[0], 1, -1)
        keys.index_copy_(self._key_slots_dim, slot, k.mT if self.spec.keys_transposed else k)
        values.index_copy_(1, slot, v.view(values.shape[0], 1, -1))
        return Past([keys], [values], held["valid"], length=held["length"])

    def extended(self, k: Tensor, v: Tensor, valid: Tensor | None) -> Past:
        """Not offered: blocks have many lengths."""
        raise ValueError(f"a static cache takes one token at a time after the prompt, got {k.shape[1]}")

    def append(self, k: Tensor, v: Tensor, x: Tensor, valid: Tensor | None) -> None:
        """Take in the prompt's keys, values and hidden states."""
        batch, rows = k.shape[:2]
        if not self._tensors:
            self._allocate(k, v, x)
        now = torch.ones(batch, rows, dtype=torch.bool, device=k.device) if valid is None else valid
        self._tensors["start"].copy_(torch.where(now.any(1), now.int().argmax(1), rows))
        self._fill(rows, k, v, x, now)

    def _fill(self, length: int, k: Tensor, v: Tensor, x: Tensor, valid: Tensor) -> None:
        """Write the newest of ``length`` tokens, as :meth:`append` has them."""
        held, rows = self._tensors, k.shape[1]
        kept = min(rows, self.capacity)
        slots = torch.arange(length - kept, length, device=k.device) % self.capacity
        k, v = (part[:, rows - kept :].transpose(1, 2) for part in (k, v))
        held["keys"].index_copy_(self._key_slots_dim, slots, k.mT if self.spec.keys_transposed else k)
        held["values"].index_copy_(2, slots, v)
        held["valid"].index_copy_(1, slots, valid[:, rows - kept :])
        if self.spec.taps:
            recent = x[:, -self.spec.taps :]
            held["inputs"].zero_()
            held["inputs"][:, self.spec.taps - recent.shape[1] :] = recent
        held["length"].fill_(length)
        self.empty = False

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply ``change`` to every tensor that has a batch, in place: addresses stay."""
        for name, tensor in self._tensors.items():
            if name != "length":
                changed = change(tensor)
                if changed.shape != tensor.shape or changed.dtype != tensor.dtype or changed.device != tensor.device:
                    raise ValueError("a static cache keeps its batch, dtype and device: make a new one")
                tensor.copy_(changed)

    def crop(self, lengths: int | Tensor) -> None:
        """Not offered: use a growing cache."""
        raise ValueError("a static cache cannot be cropped: use HyperCache() for speculative decoding")

    def reset(self) -> None:
        """Forget every token and keep the memory, at its address."""
        for name in ("valid", "length", "start"):
            if name in self._tensors:
                self._tensors[name].zero_()
        self.empty = True

    def check_crop(self, lengths: int | Tensor) -> None:
        """Not offered: use a growing cache."""
        self.crop(lengths)

    def tensors(self) -> dict[str, Tensor]:
        """The memory itself, by name."""
        return {} if self.empty else dict(self._tensors)

    def saved(self) -> dict[str, Tensor]:
        """A copy of everything remembered, by name; see :func:`~hypermlp.cache.state.check_state`."""
        length, held = self.length, self._tensors
        state = {"length": torch.tensor(length)}
        if not length:
            return state
        oldest = max(0, length - self.capacity)
        slots = torch.arange(oldest, length, device=held["keys"].device) % self.capacity
        keys = held["keys"].index_select(self._key_slots_dim, slots)
        state |= {"keys": keys.mT.contiguous() if self.spec.keys_transposed else keys}
        state |= {"values": held["values"].index_select(2, slots), "valid": held["valid"][:, slots, None]}
        state |= {f"{name}.oldest": torch.tensor(oldest) for name in ("keys", "values", "valid")}
        if self.spec.taps:
            kept = min(length, self.spec.taps)
            state["inputs"] = held["inputs"][:, self.spec.taps - kept :].clone()
            state["inputs.oldest"] = torch.tensor(length - kept)
        return state | {"start": held["start"].clone()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take back what :meth:`saved` gave."""
        length = check_state(self.spec, tensors, self.max_length)
        self._tensors, self.empty = {}, True
        if not length:
            return
        keys, values = (tensors[name].transpose(1, 2) for name in ("keys", "values"))
        x, valid = tensors.get("inputs", values), tensors.get("valid")
        self._allocate(keys, values, x)
        if "start" in tensors:
            self._tensors["start"].copy_(tensors["start"])
        now = keys.new_ones(keys.shape[:2], dtype=torch.bool) if valid is None else valid[..., 0]
        self._fill(length, keys, values, x, now)

    def _allocate(self, k: Tensor, v: Tensor, x: Tensor) -> None:
        batch, slots = k.shape[0], self.capacity
        key_shape = (k.shape[3], slots) if self.spec.keys_transposed else (slots, k.shape[3])
        with torch.inference_mode(False):  # else it could not be written outside of it
            self._tensors = {
                "keys": k.new_zeros(batch, k.shape[2], *key_shape),
                "values": v.new_zeros(batch, v.shape[2], slots, v.shape[3]),
                # of k, so that under vmap they are of as many samples
                "valid": k.new_zeros(batch, slots, dtype=torch.bool),
                "start": k.new_zeros(batch, dtype=torch.long),
                "length": torch.zeros((), dtype=torch.long, device=k.device),
            }
            if self.spec.taps:
                self._tensors["inputs"] = x.new_zeros(batch, self.spec.taps, x.shape[-1])

    @property
    def _key_slots_dim(self) -> int:
        return -1 if self.spec.keys_transposed else -2
