"""One layer's part of a cache that grows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hypermlp.cache.ring import Ring
from hypermlp.cache.spec import CacheSpec
from hypermlp.cache.state import check_state
from hypermlp.checks import as_integer, check_kind
from hypermlp.ops.decode import Past


class LayerCache:
    """Keys, values and recent hidden states of one layer, rows aligned at their newest token.

    Rows of a batch may have begun at different tokens (left padding): ``start`` says where, and
    ``valid`` which tokens count. Once a window is full, memory stays the same.

    Args:
        spec: sizes, see :class:`CacheSpec`.
        max_crop: newest tokens that :meth:`crop` may drop once the window is full, and any number before; 0 for none.
        max_length: tokens it takes at most, or None.
    """

    def __init__(self, spec: CacheSpec, max_crop: int, max_length: int | None) -> None:
        check_kind("spec", spec, CacheSpec, "CacheSpec.of(layer.config)")
        self.spec, self.max_crop = spec, as_integer("max_crop", max_crop, 0)
        self.max_length = None if max_length is None else as_integer("max_length", max_length, 1)
        self._window = spec.window
        self.length = 0
        self.start: Tensor | None = None
        self._rings: dict[str, Ring] = {}
        # until the window is full every crop is possible, which needs every hidden state; 0 does without
        self._crops_freely = bool(spec.taps and max_crop)
        self._all_inputs = self._crops_freely

    @property
    def empty(self) -> bool:
        return self.length == 0

    @property
    def known_length(self) -> int | None:
        """Tokens so far, which this kind always knows."""
        return self.length

    @property
    def batch_size(self) -> int | None:
        return self._rings["keys"].batch_size if self._rings else None

    @property
    def lengths(self) -> Tensor:
        """Tokens each row has, from its first valid one, ``[B]`` int64."""
        return self.length - self._starts()

    @property
    def nbytes(self) -> int:
        return sum(ring.data.nbytes for ring in self._rings.values())

    @property
    def _limit(self) -> int | None:
        """Tokens it takes at most."""
        return self.max_length if self.spec.by_lag else min(x for x in (self.max_length, self.spec.max_lag) if x)

    def offset(self, valid: Tensor | None) -> int | Tensor:
        """Number of the next token in its row, counted from the row's first valid one; ``[B, 1]`` if rows differ."""
        start = self._starts_with(valid)
        return self.length if start is None else (self.length - start)[:, None]

    def inputs(self, like: Tensor) -> Tensor | None:
        """The past hidden states that convolutions read, ``[B, taps, hidden_size]``; zeros before the first."""
        return self._newest_inputs(self.spec.taps, self.length, like) if self.spec.taps else None

    def _newest_inputs(self, count: int, stop: int, like: Tensor) -> Tensor:
        kept = min(count, stop)
        parts = [like.new_zeros(like.shape[0], count - kept, like.shape[-1])] if kept < count else []
        if kept:
            parts += self._rings["inputs"].tokens(stop - kept, stop)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def check(self, q: Tensor, new: int) -> None:
        """Whether ``new`` tokens with queries ``[B, ...]`` may follow; an error changes nothing."""
        limit = self._limit
        if limit is not None and self.length + new > limit:
            raise ValueError(
                f"the cache holds {self.length} tokens and {new} more pass its {limit}: "
                "start a new one, or make it with a larger max_length"
            )
        if not self.length:
            return
        held = self._rings["keys"]
        if q.shape[0] != held.batch_size:
            raise ValueError(f"the cache holds batch {held.batch_size} and got {q.shape[0]}: use repeat or select")
        if q.dtype != held.dtype:
            raise TypeError(f"the cache holds {held.dtype} and got {q.dtype}: use cache.to(dtype=...)")
        if q.device != held.device:
            raise ValueError(f"the cache is on {held.device} and got {q.device}: use cache.to(device=...)")

    def window(self, x: Tensor) -> Tensor:
        """Take in one new token's hidden states ``[B, D]``; returns the newest, oldest first, ``[B, taps + 1, D]``."""
        if not self.spec.taps:
            return x[:, None]
        self._rings["inputs"].put(x, self.length)
        return self._newest_inputs(self.spec.taps + 1, self.length + 1, x)

    def step(self, k: Tensor, v: Tensor, valid: Tensor | None) -> Past:
        """Take in the keys ``[B, S*H*K]`` and values ``[B, H*V]`` of the token given to :meth:`window`.

        ``valid`` is bool ``[B, 1]``. Returns what the token sees.
        """
        rings, length = self._rings, self.length
        if valid is not None or "valid" in rings:
            self._mark(valid, k.shape[0], 1)
        rings["keys"].put(k, length)
        rings["values"].put(v, length)
        self.length = length + 1
        if self._all_inputs and rings["keys"].oldest:
            self._drop_inputs()
        past = self._past(self.length, self._seen(self.length, 1))
        return past if self.spec.by_lag else past._replace(start=self._starts())

    def extended(self, k: Tensor, v: Tensor, valid: Tensor | None) -> Past:
        """What a block of new tokens sees, themselves included, before it is taken in."""
        seen = self._seen(self.length, k.shape[1])
        past = self._past(self.length, seen)
        if valid is not None or past.valid is not None:
            before = past.valid
            if before is None:
                before = torch.ones(k.shape[0], seen, dtype=torch.bool, device=k.device)
            now = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device) if valid is None else valid
            past = past._replace(valid=torch.cat((before, now), dim=1))
        k = k.permute((0, 2, 3, 1) if self.spec.keys_transposed else (0, 2, 1, 3)).flatten(0, 1)
        return past._replace(keys=[*past.keys, k], values=[*past.values, v.transpose(1, 2).flatten(0, 1)])

    def append(self, k: Tensor, v: Tensor, x: Tensor, valid: Tensor | None) -> None:
        """Take in keys ``[B, m, S*H, K]``, values ``[B, m, H, V]``, hidden states ``[B, m, D]``, valid ``[B, m]``."""
        batch, new = k.shape[:2]
        rows = {"keys": k.transpose(1, 2), "values": v.transpose(1, 2)}
        if self.spec.taps:
            rows["inputs"] = x
        if valid is not None or "valid" in self._rings:
            self._mark(valid, batch, new)
        for name, part in rows.items():
            if name not in self._rings or (not self.length and not self._rings[name].fits(part)):
                self._rings[name] = self._new_ring(name, part)
            self._rings[name].append(part, self.length)
        self.length += new
        if self._all_inputs and self._rings["keys"].oldest:
            self._drop_inputs()

    def _drop_inputs(self) -> None:
        """Keep the hidden states that crops of a full window need, and no more."""
        held, self._all_inputs = self._rings["inputs"], False
        ring = self._rings["inputs"] = self._new_ring("inputs", held.data)
        kept = min(self.length - held.oldest, ring.limit or 0)
        ring.hold(held.gathered(self.length - kept, self.length), self.length)

    def _mark(self, valid: Tensor | None, batch: int, new: int) -> None:
        """Take in which of ``new`` tokens count, bool ``[B, m]``; None for all."""
        if valid is None:
            valid = self._rings["valid"].data.new_ones(batch, new)
        elif "valid" not in self._rings:
            self._rings["valid"] = self._new_ring("valid", valid[..., None])
            if self.length:
                self._rings["valid"].append(valid.new_ones(batch, self.length, 1), 0)
        self.start = self._starts_with(valid)
        self._rings["valid"].append(valid[..., None], self.length)

    def crop(self, lengths: int | Tensor) -> None:
        """Forget all but the first ``lengths`` tokens of every row (of each row, if a tensor ``[B]``)."""
        self.check_crop(lengths)
        if isinstance(lengths, Tensor):
            self._crop_rows(lengths)
            return
        if lengths == 0:
            self.reset()
            return
        self.length = lengths
        if self.start is not None:
            self.start = self.start.clamp_max(lengths)

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply ``change`` to every tensor; the batch is the first dimension of each."""
        for ring in self._rings.values():
            ring.data = change(ring.data)
        if self.start is not None:
            self.start = change(self.start)

    def reset(self) -> None:
        """Forget every token and keep the memory."""
        self.length, self.start = 0, None
        self._rings.pop("valid", None)
        for ring in self._rings.values():
            ring.oldest = 0
        if self._crops_freely and not self._all_inputs and "inputs" in self._rings:
            self._all_inputs = True
            self._rings["inputs"] = self._new_ring("inputs", self._rings["inputs"].data)

    def saved(self) -> dict[str, Tensor]:
        """A copy of everything remembered, by name; see :func:`~hypermlp.cache.state.check_state`."""
        state = {"length": torch.tensor(self.length)}
        if self.length:
            for name, ring in self._rings.items():
                state[name] = ring.gathered(ring.oldest, self.length)
                state[f"{name}.oldest"] = torch.tensor(ring.oldest)
            if self.start is not None:
                state["start"] = self.start.clone()
        return state

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take back what :meth:`saved` gave."""
        self.length = check_state(self.spec, tensors, self._limit)
        self._rings, self.start = {}, None
        if not self.length:
            return
        self.start = tensors["start"].clone() if "start" in tensors else None
        self._all_inputs = self._crops_freely and not int(tensors["inputs.oldest"])
        for name in ("keys", "values", "inputs", "valid"):
            if name in tensors:
                self._rings[name] = self._new_ring(name, tensors[name])
                self._rings[name].hold(tensors[name], self.length)
        if self._all_inputs and self._rings["keys"].oldest:
            self._drop_inputs()

    def _seen(self, stop: int, new: int) -> int:
        """Tokens before ``stop`` that a query among the last of ``new`` can see (one new one is among them)."""
        window = self._window
        return stop if window is None else min(stop, window if new == 1 else window - 1)

    def _past(self, stop: int, seen: int) -> Past:
        """The last ``seen`` tokens before ``stop``."""
        rings, start = self._rings, stop - seen
        valid = None
        if "valid" in rings:
            valid = torch.cat(rings["valid"].tokens(start, stop), dim=1)[..., 0]
        return Past(rings["keys"].tokens(start, stop), rings["values"].tokens(start, stop), valid)

    def _new_ring(self, name: str, like: Tensor) -> Ring:
        limit = None if self.spec.window is None else self.spec.window + self.max_crop
        if name == "inputs":  # a token joins its convolutions' window before the oldest may go
            least = self.spec.taps + max(1, self.max_crop)
            return Ring(like, least if not self._all_inputs else None if limit is None else max(limit, least))
        return Ring(like, limit, self.spec.keys_transposed and name == "keys")

    def _starts_with(self, valid: Tensor | None) -> Tensor | None:
        """Each row's first valid token once ``valid`` ``[B, m]`` has come; None if all rows begin at the first."""
        if valid is None:
            return self.start
        first = torch.where(valid.any(1), valid.int().argmax(1), valid.shape[1])
        start = self._starts(valid)
        return torch.where(start == self.length, start + first, start)

    def _starts(self, like: Tensor | None = None) -> Tensor:
        if self.start is not None:
            return self.start
        data = self._rings["keys"].data if like is None else like
        return torch.zeros(data.shape[0], dtype=torch.long, device=data.device)

    def check_crop(self, lengths: int | Tensor) -> None:
        """Whether :meth:`crop` can do this; changes nothing."""
        if isinstance(lengths, Tensor):
            held = self.lengths if self._rings else torch.zeros_like(lengths)
            lengths = lengths.to(held.device)
            if lengths.shape != held.shape or bool(((lengths > held) | (lengths < 0)).any()):
                raise ValueError(f"crop must keep 0 to {held.tolist()} tokens of each row, got {lengths.tolist()}")
            dropped = int((held - lengths).max()) if len(held) else 0
        else:
            dropped = self.length - lengths
        if not 0 <= dropped <= self.length:
            raise ValueError(f"crop must keep 0 to {self.length} tokens, got {self.length - dropped}")
        # tokens that the next one reads must not have been overwritten, also by ones dropped before
        wrapped = ((name, ring) for name, ring in self._rings.items() if ring.oldest)
        spare = min((self.length - self._reach(name) - ring.oldest for name, ring in wrapped), default=dropped)
        if spare < dropped < self.length:
            raise ValueError(
                f"crop would drop {dropped} tokens and only the last {max(0, spare)} can be: "
                "older ones have been overwritten; make the cache with a larger max_crop"
            )

    def _reach(self, name: str) -> int:
        """Past tokens that the next one reads, in a ring that can wrap."""
        return self.spec.taps if name == "inputs" else (self.spec.window or 1) - 1

    def _crop_rows(self, lengths: Tensor) -> None:
        """Drop each row's last tokens, then shift rows so that their newest tokens align again."""
        if self.empty:
            return
        dropped = self.lengths - lengths.to(self._rings["keys"].data.device)
        most, least = int(dropped.max()), int(dropped.min())
        if least == self.length:
            self.reset()
            return
        shift, stop = dropped - least, self.length - least
        start = self._starts() + shift
        for ring in self._rings.values():
            ring.shift(shift, most - least, self.length, stop)
        self.length, self.start = stop, start
        if "valid" not in self._rings:
            valid = torch.arange(stop, device=start.device) >= start[:, None]
            self._rings["valid"] = self._new_ring("valid", valid[..., None])
            self._rings["valid"].append(valid[..., None], 0)
