"""Inputs for the forward kernels, over awkward shapes and every switch, with what they should give."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hypermlp.ops import SequenceMix, chunked
from hypermlp.ops.arguments import OperatorArgs, Options
from hypermlp.ops.reference import hyper_attention_reference
from hypermlp.ops.varlen import Tokens, zero_padded
from hypermlp_kernels import launch
from hypermlp_kernels.tiles import KERNELS, Tile
from tests.helpers import make_case


@dataclass
class Case:
    T: int = 40
    B: int = 1
    H: int = 1
    K: int = 16
    V: int = 16
    R: tuple[int, int] = (4, 4)
    rows: int | None = None  # of the tables; None: T
    window: int | None = None  # without tables
    selection: str = "glu"
    dtype: torch.dtype = torch.float64
    layout: str = "lag"
    causal: bool = True
    diag: tuple[bool, bool] = (True, True)
    identity: tuple[bool, bool] = (True, True)
    gated: bool = True
    norm: bool = True
    mask: list[list[int]] | None = None
    bounds: list[int] | None = None
    size: float = 0.5  # of queries and keys
    tile: Tile | None = None
    tables: torch.dtype | None = None

    def __post_init__(self) -> None:
        self.mask_tensor = None if self.mask is None else torch.tensor(self.mask, dtype=torch.bool)
        self.cu_seqlens = None if self.bounds is None else torch.tensor(self.bounds, dtype=torch.int32)
        made = make_case(
            batch=self.B, length=self.T, heads=self.H, qk=self.K, v=self.V, ranks=self.R, selection=self.selection,
            norm=self.norm, causal=self.causal, layout=self.layout, max_lag=self.rows or self.T,
            routing=self._parts(0), readout=self._parts(1),
        )  # fmt: skip
        # views of wider tensors: strides that no kernel may take for granted
        q, k = (self.size * torch.cat([made.tensors[name] for name in "qk"], -1)).to(self.dtype).chunk(2, -1)
        v = made.tensors["v"].to(self.dtype).transpose(1, 2).contiguous().transpose(1, 2)
        self.q, self.k, self.v = (zero_padded(x, self.mask_tensor) for x in (q, k, v))
        if self.mask is None:
            assert not self.q.is_contiguous()
        self.mixes = [self._small(mix) for mix in made.mixes()]
        has_tables = any(x is not None for mix in self.mixes for x in mix[:3])
        self.max_lag = (self.rows or self.T) if has_tables else self.window
        self.options = Options(self.selection, self.norm, 1e-12, self.causal, self.layout, self.max_lag)
        self.chosen = self.tile and dict.fromkeys(KERNELS, self.tile)

    def _parts(self, index: int) -> tuple[str, ...]:
        """Of the routing mixing, or of the readout mixing."""
        low_rank = self.R[index] > 0
        there = {"identity": self.identity[index], "diag": self.diag[index], "low_rank": low_rank, "core": self.gated}
        return tuple(name for name, present in there.items() if present)

    def _small(self, mix: SequenceMix) -> SequenceMix:
        """Tables that do not drown the identity, and cores between zero and one."""
        dtype = self.tables or self.dtype
        tables = (x if x is None else (by * x).to(dtype) for by, x in zip((0.2, 0.4, 0.4), mix.tables, strict=True))
        core = None if mix.core is None else zero_padded(torch.sigmoid(mix.core).to(self.dtype), self.mask_tensor)
        return SequenceMix(*tables, core, mix.identity)

    def to(self, device: str) -> "Case":
        """This case with its tensors on ``device``."""
        moved = copy.copy(self)
        moved.q, moved.k, moved.v = (x.to(device) for x in (self.q, self.k, self.v))
        moved.mixes = [_map(mix, lambda x: x.to(device)) for mix in self.mixes]
        moved.mask_tensor = None if self.mask_tensor is None else self.mask_tensor.to(device)
        moved.cu_seqlens = None if self.cu_seqlens is None else self.cu_seqlens.to(device)
        return moved

    def kernels(self, **options: Any) -> tuple[torch.Tensor, ...]:
        return launch.forward(
            self.q, self.k, self.v, *self.mixes, self.options,
            attention_mask=self.mask_tensor, cu_seqlens=self.cu_seqlens, chosen=self.chosen, **options,
        )  # fmt: skip

    def reference(self) -> torch.Tensor:
        o = hyper_attention_reference(
            *(x.double() for x in (self.q, self.k, self.v)), *self._double_mixes(),
            selection=self.selection, norm=self.norm, eps=1e-12, causal=self.causal, layout=self.layout,
            max_lag=self.max_lag, attention_mask=self.mask_tensor, cu_seqlens=self.cu_seqlens,
        )  # fmt: skip
        return zero_padded(o, self.mask_tensor)

    def statistics(self) -> tuple[torch.Tensor, ...]:
        streams = (x.double() for x in (self.q, self.k, self.v))
        tokens = Tokens(self.mask_tensor, self.cu_seqlens)
        return chunked.forward(OperatorArgs(*streams, *self._double_mixes(), tokens, self.options)).statistics

    def _double_mixes(self) -> list[SequenceMix]:
        return [_map(mix, torch.Tensor.double) for mix in self.mixes]


def _map(mix: SequenceMix, change: Callable[[torch.Tensor], torch.Tensor]) -> SequenceMix:
    return SequenceMix(*(x if x is None else change(x) for x in mix.tensors), mix.identity)


HOLES = [[0] * 3 + [1] * 20 + [0, 0, 1, 0] + [1] * 13, [1] * 9 + [0] + [1] * 8 + [0] * 22]
EDGES = [[0] * 5 + [1] * 35, [1] * 33 + [0] * 7]
CASES = {
    "T1": Case(T=1),
    "T2": Case(T=2, B=2, H=2),
    "T15": Case(T=15, rows=64),
    "T17": Case(T=17, selection="relu"),
    "T65": Case(T=65, K=12, V=20, R=(5, 3)),
    "T130-window33": Case(T=130, rows=33, R=(2, 2)),
    "T130-relu-window": Case(T=130, rows=50, selection="relu"),
    "window1": Case(T=20, rows=1),
    "window-without-tables": Case(R=(0, 0), diag=(False, False), window=7),
    "longer-tables": Case(T=33, rows=200),
    "one-group": Case(T=50, tile=Tile(16, 16, 32, 1, 1)),
    "four-groups": Case(T=70, rows=45, tile=Tile(64, 16, 16, 1, 1)),
    "wide-keys": Case(T=70, tile=Tile(32, 32, 16, 1, 1)),
    "heads3-widths": Case(H=3, T=20, K=8, V=33, R=(1, 2)),
    "rank17-32": Case(R=(17, 32), V=8),
    "no-mixing": Case(R=(0, 0), diag=(False, False)),
    "no-mixing-relu": Case(R=(0, 0), diag=(False, False), selection="relu", norm=False),
    "routing-only": Case(R=(4, 0), diag=(True, False)),
    "readout-only": Case(R=(0, 4), diag=(False, True)),
    "no-diag": Case(diag=(False, False), rows=20),
    "no-identity": Case(identity=(False, False)),
    "low-rank-alone": Case(identity=(False, False), diag=(False, False)),
    "no-gate": Case(gated=False),
    "no-norm": Case(norm=False),
    "position": Case(layout="position"),
    "position-relu-longer-tables": Case(layout="position", selection="relu", rows=64),
    "bidirectional": Case(layout="position", causal=False, T=45),
    "bidirectional-relu": Case(layout="position", causal=False, selection="relu"),
    "padding": Case(B=2, mask=EDGES),
    "holes": Case(B=2, mask=HOLES, rows=15),
    "holes-relu-position": Case(B=2, mask=HOLES, layout="position", selection="relu"),
    "holes-bidirectional": Case(B=2, mask=HOLES, layout="position", causal=False),
    "all-masked": Case(B=2, mask=[[0] * 40, [1] * 40]),
    "packed": Case(bounds=[0, 1, 18, 40]),
    "packed-window": Case(bounds=[0, 22, 40], rows=6),
    "packed-position": Case(bounds=[0, 17, 40], layout="position"),
    "packed-bidirectional": Case(bounds=[0, 17, 40], layout="position", causal=False),
    "packed-masked": Case(bounds=[0, 10, 40], mask=HOLES[:1]),
    "packed-within": Case(bounds=[3, 20, 20, 33], rows=12),
    "packed-within-masked": Case(bounds=[2, 12, 12, 31], mask=HOLES[:1], layout="position"),
    "packed-empty-ends": Case(bounds=[0, 0, 17, 40, 40], selection="relu"),
    "packed-of-nothing": Case(T=20, bounds=[7, 7]),
    "float32": Case(dtype=torch.float32),
    "float32-relu": Case(dtype=torch.float32, selection="relu"),
    "bfloat16": Case(dtype=torch.bfloat16),
    "bfloat16-relu": Case(dtype=torch.bfloat16, selection="relu", rows=20),
    "bfloat16-position": Case(dtype=torch.bfloat16, layout="position"),
    "bfloat16-float32-tables": Case(dtype=torch.bfloat16, tables=torch.float32),
    "float16": Case(dtype=torch.float16),
    "float16-overflow": Case(dtype=torch.float16, size=25.0),
}
# of the largest value; float64 is limited by the series of softplus2
TOLERANCE = {torch.float64: 1e-7, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    if not expected.numel():
        return 0.0
    return float((actual.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
