"""Decoding: what is compared, how its cache is filled, and the check before it is timed."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hypermlp.cache import HyperCache, StaticLayerCache
from hypermlp.layers import AttentionLayer, HyperGLU
from hypermlp_lab.bench.gate import GATE_LENGTH, MOST_ROUNDING, TOLERANCE, Verdict, randomise, relative_error
from hypermlp_lab.bench.providers import Case, Provider, by_dense_softmax, by_reference, hyperglu, softmax, softmax_wide

# smaller than what the gate decodes, so that the ring of a window wraps (its capacity is window + steps)
_GATE_WINDOW, _GATE_STEPS = 64, 40


@dataclass(frozen=True)
class DecodeCase(Case):
    """One context to measure; the last ``steps`` of its ``length`` tokens are decoded one by one.

    Attributes:
        window: ``max_lag`` of the windowed layer; the others see the whole context.
        steps: tokens timed together.
    """

    window: int = 2048
    steps: int = 16


@dataclass(frozen=True)
class DecodeProvider(Provider):
    """A layer that decodes.

    Attributes:
        cached: with a cache, or by computing the whole context anew for every token.
        compiled: with a static cache and a step compiled by ``torch.compile``.
    """

    cached: bool = True
    compiled: bool = False


class Session:
    """A layer before the last tokens of a context, ready to decode them again and again.

    The cache is filled from the layer's own keys and values of the earlier tokens: what a prompt
    leaves in it, without the attention over the prompt.
    """

    def __init__(
        self, layer: AttentionLayer, hidden_states: Tensor, steps: int, *, cached: bool, compiled: bool = False
    ) -> None:
        self.layer, self.hidden_states = layer, hidden_states
        self.steps = steps if cached else 1
        self._step: Callable[..., Tensor] = compiled_step(layer) if compiled else layer
        self.cache: HyperCache | None = None
        if cached:
            self.cache = HyperCache(max_crop=steps, static=compiled, max_length=hidden_states.shape[1])
            past = hidden_states[:, :-steps]
            with torch.inference_mode():
                keys, values = layer.keys_values(past, None)
                layer.cache_part(self.cache).append(keys, values, past, None)
        self._start: dict[str, Tensor] | None = None
        if self.cache is not None and compiled:
            self._start = {name: tensor.clone() for name, tensor in self._memory().items()}

    @torch.inference_mode()
    def decode(self) -> Tensor:
        """Outputs of the last ``steps`` tokens, ``[B, steps, hidden_size]``."""
        if self.cache is None:
            return self._step(self.hidden_states)[:, -1:]
        new = self.hidden_states[:, -self.steps :].chunk(self.steps, dim=1)
        return torch.cat([self._step(token, cache=self.cache) for token in new], dim=1)

    @torch.inference_mode()
    def rewind(self) -> None:
        """Back to where it began."""
        if self.cache is None:
            return
        if self._start is None:
            self.cache.crop(-self.steps)
            return
        # a static cache cannot be cropped, and its memory must stay where it is
        for name, tensor in self._memory().items():
            tensor.copy_(self._start[name])

    def _memory(self) -> dict[str, Tensor]:
        """Of the static cache."""
        assert self.cache is not None
        held = self.cache.layers[0]
        assert isinstance(held, StaticLayerCache)
        return held.tensors()


def compiled_step(layer: AttentionLayer) -> Callable[..., Tensor]:
    """``layer`` compiled for one shape; on a CPU called from C++, which costs a step least."""
    options: dict[str, Any] = {"cpp_wrapper": True} if next(layer.parameters()).device.type == "cpu" else {}
    return torch.compile(layer, fullgraph=True, dynamic=False, options=options)


def check(provider: DecodeProvider, case: DecodeCase) -> Verdict:
    """Decoded outputs against a float64 run over the whole context by another route.

    Decodes twice, so that going back is checked too. Allowed is what the attention benchmark's gate
    allows for outputs.
    """
    case = replace(case, length=GATE_LENGTH, window=_GATE_WINDOW, steps=_GATE_STEPS)
    try:
        error, rounding = _errors(provider, case)
    except (RuntimeError, ValueError, TypeError) as caught:
        return Verdict(provider.name, False, reason=f"{type(caught).__name__}: {caught}")
    allowed = TOLERANCE[case.dtype] + 2 * min(rounding, MOST_ROUNDING)
    # written so that a NaN fails
    if not error <= allowed:
        return Verdict(provider.name, False, error, reason=f"output: relative error {error:.1e}, allowed {allowed:.1e}")
    return Verdict(provider.name, True, error)


def _errors(provider: DecodeProvider, case: DecodeCase) -> tuple[float, float]:
    """Relative errors of the decoded outputs, and of the exact route in the layer's precision."""
    layer = provider.build(case)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device=case.device, dtype=case.dtype)

    randomise(layer, draw)
    x = draw(case.batch, case.length, case.hidden_size)
    session = Session(layer, x, case.steps, cached=provider.cached, compiled=provider.compiled)
    session.decode()
    session.rewind()
    got = session.decode()
    with torch.no_grad():
        want, rounded = (
            provider.exact(deepcopy(layer).to(dtype), x.to(dtype))[:, -session.steps :]
            for dtype in (torch.float64, case.dtype)
        )
    return relative_error(got, want), relative_error(rounded, want)


def _hyperglu_window(case: Case) -> AttentionLayer:
    assert isinstance(case, DecodeCase)
    return HyperGLU(case.hidden_size, case.num_heads, max_lag=case.window, layer_idx=0, **case.factory)


DECODE_PROVIDERS = (
    DecodeProvider("hyperglu", "HyperGLU with a cache, max_lag = the context", hyperglu("auto"), by_reference),
    DecodeProvider("hyperglu-window", "HyperGLU with a cache and a window", _hyperglu_window, by_reference),
    DecodeProvider(
        "hyperglu-recompute", "HyperGLU over the whole context for every token", hyperglu("auto"), by_reference,
        baseline=True, cached=False,
    ),
    DecodeProvider(
        "softmax", "softmax (SDPA) with a cache, same hidden size", softmax, by_dense_softmax, baseline=True
    ),
    DecodeProvider(
        "softmax-wide", "softmax with a cache, widened to the parameters of hyperglu", softmax_wide, by_dense_softmax,
        baseline=True,
    ),
)  # fmt: skip
# a minute of compiling for every context
COMPILED_PROVIDERS = (
    DecodeProvider(
        "hyperglu-compiled", "HyperGLU, max_lag = the context, compiled with a static cache", hyperglu("auto"),
        by_reference, compiled=True,
    ),
    DecodeProvider(
        "hyperglu-window-compiled", "HyperGLU with a window, compiled with a static cache", _hyperglu_window,
        by_reference, compiled=True,
    ),
    DecodeProvider(
        "softmax-wide-compiled", "softmax-wide, compiled with a static cache", softmax_wide, by_dense_softmax,
        baseline=True, compiled=True,
    ),
)  # fmt: skip
DECODE_PROVIDERS_ON_GPU = (
    DecodeProvider("hyperglu-triton", "HyperGLU with a cache, fused kernels", hyperglu("triton"), by_reference),
    *DECODE_PROVIDERS,
)
