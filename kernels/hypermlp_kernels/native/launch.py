"""Host functions: tensors in, tensors out."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hypermlp_kernels.arguments import Gradients, MixGradients, Needs, Options, Segment, SequenceMix
from hypermlp_kernels.native import abi
from hypermlp_kernels.native.build import library
from hypermlp_kernels.native.threads import torchs_parallel

_ALIGNMENT = 64  # bytes: a cache line


def enter(kernels: ctypes.CDLL, name: str, call: Any, dtype: torch.dtype) -> None:
    """Run an entry in memory of the size that it asks for, on PyTorch's threads."""
    size = getattr(kernels, f"hypermlp_{name}_bytes")(ctypes.byref(call))
    workspace = torch.empty(size // dtype.itemsize + _ALIGNMENT // dtype.itemsize, dtype=dtype)
    call.workspace = -(-workspace.data_ptr() // _ALIGNMENT) * _ALIGNMENT
    call.team = abi.Team(torchs_parallel(), torch.get_num_threads())
    getattr(kernels, f"hypermlp_{name}")(ctypes.byref(call))


class _Inputs:
    """Tensors as the kernels read them, kept alive while they run, and the call that names them."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, routing: SequenceMix, readout: SequenceMix, options: Options,
        spans: Sequence[Segment], mask: Tensor | None,
    ) -> None:  # fmt: skip
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.library = library(self.dtype)
        self._kept: list[Tensor] = []
        self.call = call = abi.Call()
        call.length, call.past = k.shape[1], k.shape[1] - q.shape[1]
        call.heads, call.maps = v.shape[2], q.shape[2] // v.shape[2]
        call.qk, call.v = q.shape[3], v.shape[3]
        call.type = abi.type_code(q.dtype)
        call.norm, call.eps, call.causal, call.by_lag = options.norm, options.eps, options.causal, options.by_lag
        call.threads = torch.get_num_threads()
        call.window = call.length if options.window is None else options.window
        tables = [x for mix in (routing, readout) for x in mix.tables if x is not None]
        call.lags = tables[0].shape[1] if tables else 0
        rows = [(b, s.start, s.stop, int(s.has_holes)) for s in spans for b in range(s.batch_start, s.batch_stop)]
        call.num_sequences = len(rows)
        call.sequences = self.address(torch.tensor(rows, dtype=torch.int64).reshape(-1, 4))
        if mask is not None:
            call.mask = self.address(mask.contiguous())
        call.q, call.k, call.values = self.stream(q), self.stream(k), self.stream(v)
        call.routing, call.readout = self._mix(routing), self._mix(readout)
        # a sequence's rows are written, and nothing else is
        self.complete = sum(stop - start for _, start, stop, _ in rows) == k.shape[0] * k.shape[1]

    def stream(self, x: Tensor) -> abi.Stream:
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            x = x.contiguous()
        self._kept.append(x)
        return abi.stream(x)

    def new(self, *shape: int) -> Tensor:
        """``[B, T, ...]``, zero where no sequence has a token."""
        return torch.empty(shape, dtype=self.dtype) if self.complete else torch.zeros(shape, dtype=self.dtype)

    def run(self, name: str) -> None:
        enter(self.library, name, self.call, self.dtype)

    def address(self, x: Tensor) -> int:
        self._kept.append(x)
        return x.data_ptr()

    def _table(self, x: Tensor | None) -> int | None:
        return None if x is None else self.address(x.detach().to(self.dtype).contiguous())

    def _mix(self, mix: SequenceMix) -> abi.Mix:
        diag, down, up = (self._table(x) for x in mix.tables)
        gate = abi.Stream() if mix.core is None else self.stream(mix.core)
        return abi.Mix(diag, down, up, gate, mix.rank, mix.identity)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routing_mix: SequenceMix,
    readout_mix: SequenceMix,
    options: Options,
    spans: Sequence[Segment],
    attention_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:
    """``(o, z1, rho, z2)`` in float32, or float64 for float64, and whether a number of the streams is not finite.

    The rest is then of no use: call again with zeros in place of such numbers, and mark the rows that see one.

    Args:
        q: ``[B, m, S*H, K]``, the last ``m`` tokens' queries, on a CPU, of any float dtype.
        k: ``[B, T, S*H, K]``; v: ``[B, T, H, V]``.
        routing_mix, readout_mix: gates of the ``m`` tokens.
        options: what is computed.
        spans: the sequences; other tokens get zeros (and ``rho`` one).
        attention_mask: bool ``[B, T]``, read where a span has holes.
    """
    x = _Inputs(q, k, v, routing_mix, readout_mix, options, spans, attention_mask)
    call, (batch, length, maps, _), (heads, width) = x.call, q.shape, v.shape[2:]
    o = x.new(batch, length, heads, width)
    z1, z2 = x.new(batch, length, maps, call.routing.rank), x.new(batch, length, heads, call.readout.rank)
    rho = torch.ones(batch, length, heads, dtype=x.dtype)
    call.o, call.z1, call.rho, call.z2 = (y.data_ptr() for y in (o, z1, rho, z2))
    if call.num_sequences:
        x.run("forward")
    return o, z1, rho, z2, bool(call.nonfinite)


def backward(
    grad_o: Tensor,
    o: Tensor,
    statistics: tuple[Tensor, Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routing_mix: SequenceMix,
    readout_mix: SequenceMix,
    needs: Needs,
    options: Options,
    spans: Sequence[Segment],
    attention_mask: Tensor | None,
) -> tuple[Gradients, bool]:
    """Gradients of the operator, in float32, or float64 for float64.

    And whether a number of the streams is not finite, as in the forward.

    Args:
        grad_o: ``[B, T, H, V]``.
        o: the forward's output, ``statistics`` its ``z1``, ``rho`` and ``z2``.
        q, k, v, routing_mix, readout_mix: as in the forward, all with ``T`` tokens.
        needs: the gradients asked for; the others are None.
        options, spans, attention_mask: as in the forward.
    """
    x = _Inputs(q, k, v, routing_mix, readout_mix, options, spans, attention_mask)
    call = x.call
    call.o, call.z1, call.rho, call.z2 = (x.address(y.contiguous()) for y in (o, *statistics))
    call.grad_o = x.stream(grad_o.to(x.dtype))
    dq = x.new(*q.shape) if needs.q else None
    dk, dv = (torch.zeros(y.shape, dtype=x.dtype) if need else None for y, need in ((k, needs.k), (v, needs.v)))
    call.dq, call.dk, call.dv = (None if y is None else y.data_ptr() for y in (dq, dk, dv))
    mixes = []
    for name, mix, asked in (("routing", routing_mix, needs.routing), ("readout", readout_mix, needs.readout)):
        diag, down, up = (
            torch.zeros(y.shape, dtype=x.dtype) if need and y is not None else None
            for y, need in ((mix.diag, asked.diag), (mix.down, asked.down), (mix.up, asked.up))
        )
        gate = x.new(*mix.core.shape) if asked.core and mix.core is not None else None
        found = MixGradients(diag, down, up, gate)
        setattr(call, f"d_{name}", abi.MixGrads(*(None if y is None else y.data_ptr() for y in found)))
        mixes.append(found)
    if call.num_sequences:
        x.run("backward")
    routing, readout = mixes
    return Gradients(dq, dk, dv, routing, readout), bool(call.nonfinite)
