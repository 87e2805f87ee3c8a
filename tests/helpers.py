"""What every test shares: operator inputs, one way to evaluate them, and the two comparisons.

To test a new path, add its name to ``BACKENDS``. The Triton kernels are among them in processes that interpret them,
which ``tests/kernels/test_interpreted.py`` starts.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from hypermlp.ops import SequenceMix, hyper_attention
from hypermlp.ops.chunked import tiling
from hypermlp.ops.reference import hyper_attention_reference
from hypermlp.ops.varlen import zero_padded

# triton reads it when it is imported
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["reference", "triton"] if INTERPRETED else ["reference", "chunked", "native"]
# of results in float64, where it is not that of assert_close: the kernels' softplus is a series
RTOL = {"triton": 1e-7}
STREAMS = ("q", "k", "v", "routing.core", "readout.core")  # [B, T, ...]; all else is a table
FULL = ("identity", "diag", "low_rank", "core")


class Case(NamedTuple):
    """Inputs of the operator by name (``"routing.diag"``) and its options."""

    tensors: dict[str, Tensor]
    options: dict[str, Any]

    def __repr__(self) -> str:
        return f"Case({ {name: tuple(x.shape) for name, x in self.tensors.items()} }, {self.options})"

    @property
    def by_lag(self) -> bool:
        layout = self.options["layout"]
        return layout == "lag" or (layout is None and self.options["causal"])

    def with_tensors(self, tensors: dict[str, Tensor]) -> Case:
        return Case({**self.tensors, **tensors}, self.options)

    def with_options(self, **options: Any) -> Case:
        return Case(self.tensors, self.options | options)

    def map(self, change: Callable[[Tensor], Tensor]) -> Case:
        return Case({name: change(x) for name, x in self.tensors.items()}, self.options)

    def mixes(self) -> tuple[SequenceMix, SequenceMix]:
        routing, readout = (
            SequenceMix(
                *(self.tensors.get(f"{name}.{field}") for field in ("diag", "down", "up", "core")),
                identity=self.options[f"{name}_identity"],
            )
            for name in ("routing", "readout")
        )
        return routing, readout

    @property
    def operator_options(self) -> dict[str, Any]:
        return {name: x for name, x in self.options.items() if not name.endswith("_identity")}

    def run(self, backend: str, op: Callable[..., Tensor] = hyper_attention, **kwargs: Any) -> Tensor:
        q, k, v = (self.tensors[name] for name in "qkv")
        return op(q, k, v, *self.mixes(), **{**self.operator_options, "backend": backend, **kwargs})


def make_case(
    seed: int = 0,
    *,
    batch: int = 1,
    length: int = 9,
    heads: int = 2,
    qk: int = 3,
    v: int = 4,
    ranks: tuple[int, int] = (2, 3),
    selection: str = "glu",
    norm: bool = True,
    eps: float = 1e-12,
    causal: bool = True,
    layout: str | None = None,
    max_lag: int | None = None,
    routing: tuple[str, ...] = FULL,
    readout: tuple[str, ...] = FULL,
    dtype: torch.dtype = torch.float64,
) -> Case:
    """Random inputs with every switch; ``routing=("identity",)`` leaves that mixing out.

    ``max_lag`` None: as many table rows as tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    maps = heads * (2 if selection == "glu" else 1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    tensors = {name: normal(batch, length, maps, qk) for name in "qk"} | {"v": normal(batch, length, heads, v)}
    rows = length if max_lag is None else max_lag
    for name, parts, count, rank in (("routing", routing, maps, ranks[0]), ("readout", readout, heads, ranks[1])):
        if "diag" in parts:
            tensors[f"{name}.diag"] = normal(count, rows) * 0.5
        if "low_rank" in parts:
            tensors |= {f"{name}.{field}": normal(count, rows, rank) * 0.5 for field in ("down", "up")}
            if "core" in parts:
                tensors[f"{name}.core"] = normal(batch, length, count, rank)
    options = {
        "selection": selection, "norm": norm, "eps": eps, "causal": causal, "layout": layout, "max_lag": max_lag,
        "routing_identity": "identity" in routing, "readout_identity": "identity" in readout,
    }  # fmt: skip
    return Case(tensors, options)


class Evaluated(NamedTuple):
    """An output, its gradients along the tokens ``[B, T, ...]``, and those of tables or parameters."""

    output: Tensor
    streams: dict[str, Tensor]
    shared: dict[str, Tensor]

    def named(self) -> dict[str, Tensor]:
        return {"output": self.output} | {f"gradient of {n}": g for n, g in (self.streams | self.shared).items()}


def evaluate(case: Case, run: Callable[[Case], Tensor], weight: Tensor | None = None) -> Evaluated:
    """``run(case)`` and every gradient of it, weighted at random."""
    case = case.map(lambda x: x.detach().clone().requires_grad_())
    output = run(case)
    if weight is None:
        generator = torch.Generator().manual_seed(99)
        weight = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
    found = torch.autograd.grad(output, list(case.tensors.values()), weight, allow_unused=True)
    grads = {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(case.tensors.items(), found, strict=True)}
    return Evaluated(
        output.detach(),
        {name: grad for name, grad in grads.items() if name in STREAMS},
        {name: grad for name, grad in grads.items() if name not in STREAMS},
    )


def evaluate_layer(layer: nn.Module, hidden_states: Tensor, weight: Tensor, **kwargs: Any) -> Evaluated:
    """A layer's output, the gradient of its input and those of its parameters."""
    x = hidden_states.detach().clone().requires_grad_()
    parameters = dict(layer.named_parameters())
    output = layer(x, **kwargs)
    found = torch.autograd.grad(output, [x, *parameters.values()], weight)
    return Evaluated(output.detach(), {"hidden_states": found[0]}, dict(zip(parameters, found[1:], strict=True)))


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference; infinite where either is not a number."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    difference = (actual.double() - expected.double()).abs().nan_to_num(float("inf"))
    return float(difference.detach().max()) if difference.numel() else 0.0


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-9) -> None:
    """Equal up to ``rtol`` times the largest entry (or 1): for two computations in float64."""
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        bound = rtol * max(1.0, float(expected[name].detach().abs().max()) if x.numel() else 0.0)
        assert error(x, expected[name]) <= bound, f"{name}: {error(x, expected[name]):.2e} > {bound:.2e}"


def euclidean_error(actual: Tensor, expected: Tensor) -> float:
    """Length of the difference; infinite where either is not a number."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    return float((actual.double() - expected.double()).detach().norm().nan_to_num(math.inf))


def assert_close_to_reference(
    case: Case, run: Callable[[Case], Tensor], measure: Callable[[Tensor, Tensor], float] = error, **kwargs: Any
) -> None:
    """The error of ``run``, gradients included, is at most twice what the plain equations make in the same precision.

    Both are judged against the reference in float64 on the same inputs. To twice the yardstick come
    one rounding of the result and what a float32 rounding of the inputs does to it, at worst of a few
    draws: where a row nearly cancels no path can do better. In float64 the comparison is direct.
    ``measure`` of the error is by default the largest. ``kwargs`` go to the reference: a mask, bounds of
    packed sequences.
    """
    weight = torch.randn(case.tensors["v"].shape, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    weight = weight.to(case.tensors["v"])

    def judged(case: Case, run: Callable[[Case], Tensor]) -> dict[str, Tensor]:
        return evaluate(case, run, weight.to(case.tensors["v"].dtype)).named()

    _assert_no_worse(case, run, judged, measure, kwargs)


def assert_forward_close_to_reference(case: Case, run: Callable[[Case], Tensor], **kwargs: Any) -> None:
    """:func:`assert_close_to_reference` of the output alone."""

    @torch.no_grad()
    def judged(case: Case, run: Callable[[Case], Tensor]) -> dict[str, Tensor]:
        return {"output": run(case)}

    _assert_no_worse(case, run, judged, error, kwargs)


def _assert_no_worse(
    case: Case,
    run: Callable[[Case], Tensor],
    judged: Callable[[Case, Callable[[Case], Tensor]], dict[str, Tensor]],
    measure: Callable[[Tensor, Tensor], float],
    kwargs: dict[str, Any],
) -> None:
    mask = kwargs.get("attention_mask")

    def reference(case: Case, compute_dtype: torch.dtype) -> Tensor:
        case = case.with_tensors({n: zero_padded(x, mask) for n, x in case.tensors.items() if n in STREAMS})
        q, k, v = (case.tensors[name] for name in "qkv")
        options = case.operator_options | {"layout": "lag" if case.by_lag else "position"} | kwargs
        rows = [x.shape[1] for name, x in case.tensors.items() if name not in STREAMS]
        options["max_lag"] = rows[0] if rows else options["max_lag"]
        # an eps that is zero in float16 would make padded rows 0 / 0
        options["eps"] = max(options["eps"], torch.finfo(compute_dtype).smallest_normal)
        o = hyper_attention_reference(q, k, v, *case.mixes(), **options, compute_dtype=compute_dtype)
        return zero_padded(o, mask)

    dtype = case.tensors["q"].dtype
    actual = judged(case, run)
    wide = case.map(lambda x: x.double())
    truth = judged(wide, lambda c: reference(c, torch.float64))
    if dtype == torch.float64:
        assert_close(actual, truth)
        return
    yardstick = judged(case, lambda c: reference(c, dtype))
    step = torch.finfo(torch.float32).eps
    moved = [
        judged(
            wide.map(lambda x: x * (1 + step * (2 * torch.rand_like(x) - 1))),
            lambda c: reference(c, torch.float64),
        )
        for _ in range(4)
    ]
    for name, x in actual.items():
        if not x.numel():
            continue
        rounding = torch.finfo(x.dtype).eps * measure(truth[name], torch.zeros_like(truth[name]))
        rounding += max(measure(draw[name], truth[name]) for draw in moved)
        allowed, made = 2 * measure(yardstick[name], truth[name]) + rounding, measure(x, truth[name])
        assert math.isfinite(allowed), f"{name}: the plain equations overflow in {dtype}, so they are no yardstick"
        assert made <= allowed, f"{name}: error {made:.2e} > {allowed:.2e}"


@contextmanager
def tiles(rows: int, elements: int = 1 << 18) -> Iterator[None]:
    """Chunked tiles of few rows, so that short sequences have many."""
    with mock.patch.multiple(tiling, _MIN_ROWS=rows, _MAX_ROWS=max(rows, 16), _CPU_TILE_ELEMENTS=elements):
        yield
