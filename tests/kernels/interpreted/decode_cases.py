"""One new token after awkward pasts, in memory as caches hold it, with what it should read."""

from dataclasses import dataclass
from typing import Any

import torch
from cases import HOLES, Case

from hypermlp_kernels.arguments import SequenceMix
from hypermlp_kernels.launch_decode import DecodeTile, decode


@dataclass
class Decode(Case):
    """The last token of a :class:`Case`, against the tokens it can reach.

    Attributes:
        spare: slots of the cache's memory beyond those tokens.
        first: slot of the oldest of them; the memory wraps where they do not fit after it.
        slots_last: memory ``[.., width, slots]``, else ``[.., slots, width]``.
        static: the whole memory is handed over with the number of tokens so far.
        splits: programs that share a head's slots; None for the rule.
    """

    spare: int = 3
    first: int = 0
    slots_last: bool = False
    static: bool = False
    splits: int | None = 2
    decode_tile: DecodeTile | None = None

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What :func:`decode` takes. Slots without a token hold NaN."""
        window = self.max_lag if self.layout == "lag" else None
        reach = min(self.T, window or self.T)
        capacity = reach + self.spare
        if self.static:
            assert not self.spare or capacity >= self.T
            first = (self.T - reach) % capacity
        else:
            first = self.first
        keys, values = (self._memory(x[:, self.T - reach :], capacity, first) for x in (self.k, self.v))
        valid = start = None
        if self.mask_tensor is not None:
            valid = self.mask_tensor[:, self.T - reach :]
        if self.layout == "position":
            start = torch.zeros(self.B, dtype=torch.long, device=self.q.device)
            if self.mask_tensor is not None:
                start = torch.where(self.mask_tensor.any(1), self.mask_tensor.int().argmax(1), self.T)
        length = None
        if self.static:
            length = torch.tensor(self.T, device=self.q.device)
            slots = (first + torch.arange(reach)) % capacity
            held = torch.zeros(self.B, capacity, dtype=torch.bool, device=self.q.device)
            held[:, slots] = True if valid is None else valid
            valid = held
        else:
            older = min(reach, capacity - first)
            keys, values = (
                [part for part in (x[:, :, first : first + older], x[:, :, : reach - older]) if part.shape[2]]
                for x in (keys[0], values[0])
            )
        options = {
            "options": self.options, "valid": valid, "start": start, "length": length,
            "chosen": self.decode_tile, "num_splits": self.splits,
        }  # fmt: skip
        mixes = (
            SequenceMix(*mix[:3], None if mix.core is None else mix.core[:, -1:], mix.identity) for mix in self.mixes
        )
        return (self.q[:, -1:], keys, values, *mixes), options

    def run(self) -> torch.Tensor:
        arguments, options = self.arguments()
        return decode(*arguments, **options)

    def expected(self) -> torch.Tensor:
        return self.reference()[:, -1:]

    def _memory(self, x: torch.Tensor, capacity: int, first: int) -> list[torch.Tensor]:
        batch, tokens, heads, width = x.shape
        shape = (batch, heads, width, capacity) if self.slots_last else (batch, heads, capacity, width)
        memory = torch.full(shape, float("nan"), dtype=x.dtype, device=x.device)
        view = memory.mT if self.slots_last else memory
        view[:, :, (first + torch.arange(tokens)) % capacity] = x.transpose(1, 2)
        return [view]


LEFT = [[0] * 5 + [1] * 35, [0] * 39 + [1]]
SWITCHES: dict[str, dict[str, Any]] = {
    "glu": {},
    "relu": {"selection": "relu"},
    "no-norm": {"norm": False},
    "no-mixing": {"R": (0, 0), "diag": (False, False)},
    "no-mixing-relu": {"R": (0, 0), "diag": (False, False), "selection": "relu", "norm": False},
    "routing-only": {"R": (4, 0), "diag": (True, False)},
    "readout-only": {"R": (0, 4), "diag": (False, True)},
    "no-diag": {"diag": (False, False)},
    "no-identity": {"identity": (False, False)},
    "low-rank-alone": {"identity": (False, False), "diag": (False, False)},
    "no-gate": {"gated": False},
    "rank17-32": {"R": (17, 32), "V": 8},
    "odd-widths": {"H": 3, "K": 5, "V": 33, "R": (1, 3)},
}
CASES = {
    **{f"{n}-keys": Decode(T=n, splits=3) for n in (1, 2, 15, 16, 17, 65)},
    **{name: Decode(T=37, **options) for name, options in SWITCHES.items()},
    "norm-below-eps": Decode(size=1e-9),
    "one-split": Decode(splits=1),
    "more-splits-than-tiles": Decode(T=20, splits=7),
    "many-splits": Decode(T=40, splits=20, decode_tile=DecodeTile(2, 4, 2, 8, 1)),
    "wide-tile": Decode(T=40, V=33, decode_tile=DecodeTile(64, 32, 16, 64, 1)),
    "longer-tables": Decode(T=33, rows=200),
    "window": Decode(T=50, rows=33, B=2, H=2),
    "window1": Decode(T=20, rows=1),
    "window-without-tables": Decode(R=(0, 0), diag=(False, False), window=7),
    "wrapped": Decode(T=50, rows=33, first=30),
    "wrapped-at-the-newest": Decode(T=50, rows=33, first=4, spare=3),
    "wrapped-relu-holes": Decode(B=2, mask=HOLES, rows=35, first=11, selection="relu"),
    "left-padding": Decode(B=2, mask=LEFT),
    "left-padding-position": Decode(B=2, mask=LEFT, layout="position"),
    "holes": Decode(B=2, mask=HOLES, rows=15),
    "row-without-tokens": Decode(B=2, mask=[[0] * 40, [1] * 40]),
    "position": Decode(layout="position", rows=64),
    "position-relu-holes": Decode(B=2, mask=HOLES, layout="position", selection="relu", first=20),
    "static": Decode(T=21, rows=64, static=True, spare=30, splits=3),
    "static-first-token": Decode(T=1, rows=64, static=True, spare=30, splits=3),
    "static-full": Decode(T=33, rows=33, static=True, spare=0),
    "static-wrapped": Decode(T=50, rows=33, B=2, H=2, static=True, spare=0),
    "static-wrapped-holes": Decode(B=2, mask=HOLES, rows=15, static=True, spare=0),
    "slots-last": Decode(T=37, slots_last=True, H=2),
    "slots-last-wrapped": Decode(T=70, rows=49, first=42, slots_last=True, H=2, V=33, K=5),
    "slots-last-late-start": Decode(T=40, first=21, spare=30, slots_last=True, dtype=torch.bfloat16),
    "slots-last-holes": Decode(B=2, mask=HOLES, rows=35, first=11, slots_last=True),
    "slots-last-static": Decode(T=50, rows=33, static=True, spare=0, slots_last=True),
    "float32": Decode(dtype=torch.float32, T=65),
    "float32-relu": Decode(dtype=torch.float32, selection="relu"),
    "bfloat16": Decode(dtype=torch.bfloat16, T=65),
    "bfloat16-position": Decode(dtype=torch.bfloat16, layout="position"),
    "bfloat16-float32-tables": Decode(dtype=torch.bfloat16, tables=torch.float32),
    "float16": Decode(dtype=torch.float16, T=65),
    "float16-overflow": Decode(dtype=torch.float16, size=25.0),
}
