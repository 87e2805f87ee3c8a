"""What the host functions share: a call prepared for the kernels, its tables, and how a kernel gets its tile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hypermlp_kernels.arguments import Options, SequenceMix
from hypermlp_kernels.autotune import TUNED
from hypermlp_kernels.backward_tiles import BackwardTile
from hypermlp_kernels.constants import Constants, MixConstants
from hypermlp_kernels.schedule import block_table, count_blocks
from hypermlp_kernels.skew import rotate
from hypermlp_kernels.tiles import Design, Kernel, Precision, Tile, family_of, pad_width, tiles

LOG2E, LN2 = 1.4426950408889634, 0.6931471805599453
DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32, torch.float64: tl.float64}
# a product and a sum as one instruction: asked for, since Triton 3.9 warns that its default will change
FUSION = {"enable_fp_fusion": True}
_INTERPRETED = not isinstance(rotate, triton.JITFunction)
# small enough for the interpreter to be quick, with several row groups to a block
_INTERPRETER_TILE = Tile(32, 16, 16, 1, 1)


def scale_mode(mix: SequenceMix) -> str:
    """Where the scale of what a mixing leaves in place comes from: a table, or it is one or zero."""
    return "table" if mix.diag is not None else "identity" if mix.identity else "zero"


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter (``TRITON_INTERPRET=1`` before triton is imported)."""
    return _INTERPRETED


def cuda_arch() -> int | None:
    """Of the current device, 80 for compute capability 8.0; ``None`` if it is not NVIDIA's, and in the interpreter."""
    target = None if interpreted() else triton.runtime.driver.active.get_current_target()
    return int(target.arch) if target is not None and target.backend == "cuda" else None


class Call(NamedTuple):
    """One call of the operator, prepared for the kernels."""

    q: Tensor
    k: Tensor
    v: Tensor
    routing: SequenceMix
    readout: SequenceMix
    z1: Tensor
    rho: Tensor
    z2: Tensor
    options: Options
    precision: Precision
    attention_mask: Tensor | None
    sequences: tuple[Tensor, Tensor, Tensor] | None
    chosen: Mapping[Kernel, Tile] | None
    design: Design = "recompute"
    autotune: bool = False

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.v.shape[0], self.v.shape[1], self.v.shape[2]

    @property
    def max_lag(self) -> int:
        """Rows of the tables, and by lag the window."""
        return self.v.shape[1] if self.options.max_lag is None else self.options.max_lag

    @property
    def accumulator(self) -> torch.dtype:
        return torch.promote_types(self.q.dtype, torch.float32)

    @property
    def mix_dtype(self) -> torch.dtype:
        """Of the low-rank products: unnormalised rows outgrow float16, so there it is float32."""
        return torch.float32 if self.q.dtype == torch.float16 else self.q.dtype

    def constants(self, tile: Tile | BackwardTile) -> Constants:
        """What its kernels are compiled for with ``tile``."""
        arch = cuda_arch()
        of_warps = arch is not None and family_of("cuda", arch) == "ampere"
        return Constants(
            GLU=self.options.glu,
            BY_LAG=self.options.by_lag,
            CAUSAL=self.options.causal,
            NORM=self.options.norm,
            HAS_BLOCKS=self.sequences is not None,
            HOLES=self.attention_mask is not None,
            PACKED=self.options.glu and self.options.by_lag and self.q.dtype == torch.bfloat16,
            ASM=arch is not None,
            CHAINED=of_warps and tile.rows >= 16 * tile.warps,
            ACC=DTYPES[self.accumulator],
            MIX=DTYPES[self.mix_dtype],
            PRECISION="ieee" if self.precision == "ieee" else "tf32",
            K=self.q.shape[-1],
            BK=pad_width(self.q.shape[-1]),
            BM=tile.rows,
            BN=tile.keys,
            NG=tile.rows // tile.keys if self.options.by_lag else 1,
            STAGES=tile.stages,
        )

    def key(self, kernel: Kernel) -> str:
        """What a tuned tile is remembered by: all that a kernel is compiled for, so never the number of tokens."""
        target = triton.runtime.driver.active.get_current_target()
        mixes = (
            f"{scale_mode(mix)}/{mix.rank}{'/gated' if mix.core is not None else ''}"
            for mix in (self.routing, self.readout)
        )
        switches = {name: getattr(self.options, name) for name in ("glu", "by_lag", "causal", "norm")}
        switches |= {"masked": self.attention_mask is not None, "blocks": self.sequences is not None}
        widths = f"K{self.q.shape[-1]} V{self.v.shape[-1]} H{self.sizes[2]}"
        on = " ".join(name for name, switch in switches.items() if switch)
        return f"{target.arch} {kernel} {self.design} {self.precision} {widths} {' '.join(mixes)} {on}".rstrip()

    def count_blocks(self, rows: int) -> tuple[int, int]:
        """Blocks of ``rows`` rows, and programs for each of them."""
        batch, length, heads = self.sizes
        if self.sequences is None:
            return triton.cdiv(length, rows), batch * heads
        return count_blocks(self.sequences, batch, length, rows), heads

    def blocks(self, rows: int) -> tuple[Tensor, int, int]:
        """Block table (or any tensor), its length, and programs for each of its blocks."""
        if self.sequences is None:
            return self.q, *self.count_blocks(rows)
        return block_table(self.sequences, *self.sizes[:2], rows), *self.count_blocks(rows)


def precision_of(dtype: torch.dtype, allow_tf32: bool) -> Precision:
    """How products are made, which decides on the tiles."""
    if dtype in (torch.bfloat16, torch.float16):
        return "bf16" if dtype == torch.bfloat16 else "fp16"
    return "tf32" if allow_tf32 else "ieee"


def candidates(kernel: Kernel, call: Call) -> tuple[Tile, ...]:
    """The tiles that a launch may take, preferred ones first."""
    if call.chosen is not None:
        return (call.chosen[kernel],)
    if interpreted():
        return (_INTERPRETER_TILE,)
    target = triton.runtime.driver.active.get_current_target()
    found = tiles(kernel, call.precision, call.v.shape[-1], family_of(target.backend, target.arch))
    tuned = TUNED.get(call.key(kernel))
    return found if tuned is None else tuple(dict.fromkeys((tuned, *found)))


def run(kernel: Kernel, call: Call, launch: Callable[[Tile], None]) -> None:
    """Launch with the first tile that the device has shared memory for, or with the fastest if asked to search."""
    choices = candidates(kernel, call)
    if (call.autotune or TUNED.wanted) and len(choices) > 1:
        choices = (TUNED.search(call.key(kernel), choices, launch),)
    if not any(_fits(launch, choice) for choice in choices[:-1]):
        launch(choices[-1])


def _fits(launch: Callable[[Tile], None], tile: Tile) -> bool:
    try:
        launch(tile)
    except triton.OutOfResources:
        return False
    return True


def launch_options(tile: Tile | BackwardTile) -> dict[str, int]:
    return {"num_warps": tile.warps, "num_stages": tile.stages, **FUSION}


def mix_constants(mix: SequenceMix, gated: bool = True) -> MixConstants:
    """What kernels are compiled for of a mixing, of its transpose if not ``gated``: that has no gate of its own."""
    return MixConstants(mix.rank, pad_width(mix.rank), scale_mode(mix), gated and mix.core is not None)


def strides(*streams: Tensor) -> tuple[int, ...]:
    """Of batch rows, tokens and heads, as kernels take them."""
    return tuple(stride for x in streams for stride in x.stride()[:3])


def unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def aligned(*streams: Tensor) -> bool:
    """Whether every row of every head begins at a multiple of 16 elements: of a compact tensor, whatever its length."""
    return all(stride % 16 == 0 for stride in strides(*streams))


def gate_of(mix: SequenceMix, otherwise: Tensor) -> Tensor:
    return otherwise if mix.core is None else unit_stride(mix.core)


def holes(call: Call) -> Tensor:
    """uint8 ``[B, T]``, 1 for a valid token; any tensor without a mask."""
    return call.q if call.attention_mask is None else call.attention_mask.to(torch.uint8).contiguous()


def padded_table(table: Tensor | None, dtype: torch.dtype, otherwise: Tensor | None = None) -> Tensor:
    """``[heads, L, R]`` as a contiguous dot operand: the rank padded with zeros. Tables are small."""
    if table is None:
        assert otherwise is not None
        return otherwise
    rank = table.shape[-1]
    return torch.nn.functional.pad(table.to(dtype), (0, pad_width(rank) - rank)).contiguous()


def scale_table(mix: SequenceMix, unit: float | Tensor, call: Call) -> Tensor:
    """``unit * (identity + diag)``, ``[heads, L]``; any tensor without a diagonal."""
    if mix.diag is None:
        return call.q
    return ((mix.diag.to(call.accumulator) + float(mix.identity)) * unit).contiguous()


class MixTensors(NamedTuple):
    """Of a mixing, in the order that kernels take them: any tensor in place of one that it does not have."""

    scale: Tensor
    up: Tensor
    gate: Tensor
    z: Tensor


def routing_tensors(call: Call) -> MixTensors:
    """Of the first mixing; the scale maps count in units of 1 / ln 2, for ``softplus2``."""
    unit = torch.ones(call.q.shape[2], 1, dtype=call.accumulator, device=call.q.device)
    unit[call.sizes[2] :] *= LOG2E
    return _tensors(call.routing, unit, call.z1, call)


def readout_tensors(call: Call) -> MixTensors:
    """Of the second mixing, whose map counts in units of ln 2 where ``softplus2`` made it."""
    return _tensors(call.readout, LN2 if call.options.glu else 1.0, call.z2, call)


def _tensors(mix: SequenceMix, unit: float | Tensor, z: Tensor, call: Call) -> MixTensors:
    up = padded_table(mix.up, call.mix_dtype, call.q)
    return MixTensors(scale_table(mix, unit, call), up, gate_of(mix, call.q), z)


def multiprocessors() -> int:
    """Of the current device; 1 in the interpreter."""
    if interpreted():
        return 1
    device = triton.runtime.driver.active
    return int(device.utils.get_device_properties(device.get_current_device())["multiprocessor_count"])


def on_device(x: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
