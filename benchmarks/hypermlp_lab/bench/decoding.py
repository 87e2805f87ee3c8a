"""Decoding: what is compared, how its cache is filled, how it is checked and timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hypermlp.cache import CacheSpec, HyperCache, StaticLayerCache
from hypermlp.layers import AttentionLayer, HyperGLU
from hypermlp_lab.bench.gate import Errors, compare
from hypermlp_lab.bench.layers import (
    LayerCase,
    LayerProvider,
    by_dense_softmax,
    by_reference,
    hyperglu,
    randomised,
    softmax,
    softmax_wide,
)
from hypermlp_lab.bench.measure import wall_seconds
from hypermlp_lab.bench.run import Benchmark, Prepared, SkipError, count_parameters
from hypermlp_lab.bench.settings import Settings

# smaller than what the gate decodes, so that the ring of a window wraps (its capacity is window + steps)
_GATE_WINDOW, _GATE_STEPS = 64, 40


@dataclass(frozen=True, kw_only=True)
class DecodeCase(LayerCase):
    """One context to measure; the last ``steps`` of its ``length`` tokens are decoded one by one.

    Attributes:
        window: ``max_lag`` of the windowed layer; the others see the whole context.
        steps: tokens timed together.
        recompute_limit: longest context that is computed anew for every token.
    """

    window: int = 2048
    steps: int = 16
    recompute_limit: int = 4096


@dataclass(frozen=True, kw_only=True)
class DecodeProvider(LayerProvider):
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
                keys, values = layer.keys_values(past)
                layer.cache_part(self.cache).append(keys, values, past, None)
        # a static cache cannot be cropped, and its memory must stay where it is
        self._start = {name: tensor.clone() for name, tensor in self._memory().items()} if compiled else None

    def seconds(self) -> float:
        """Of one token, on average over those decoded; then it is back where it began."""
        seconds = wall_seconds(self.decode, self.hidden_states.device)
        self.rewind()
        return seconds / self.steps

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
        if self._start is not None:
            for name, tensor in self._memory().items():
                tensor.copy_(self._start[name])
        elif self.cache is not None:
            self.cache.crop(-self.steps)

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


class DecodeBenchmark(Benchmark[DecodeProvider, DecodeCase]):
    """The time of one token after a context."""

    name = "decode"

    def __init__(self, providers: Sequence[DecodeProvider], settings: Settings[DecodeCase]) -> None:
        for case in settings.cases:
            if case.length <= case.steps:
                raise ValueError(f"lengths must exceed the {case.steps} tokens timed together, got {case.length}")
        super().__init__(providers, settings)

    def modes(self, case: DecodeCase) -> Sequence[str]:
        return ("decode",)

    def begin(self, case: DecodeCase) -> None:
        # every context compiles anew, and PyTorch keeps few compiled forms of one function
        torch.compiler.reset()

    def gate_cases(self) -> dict[str, DecodeCase]:
        cases = super().gate_cases()
        return {where: replace(case, window=_GATE_WINDOW, steps=_GATE_STEPS) for where, case in cases.items()}

    def errors(self, provider: DecodeProvider, case: DecodeCase) -> Errors:
        """Of decoded outputs, against a run over the whole context. Decoded twice: going back is checked, too."""
        layer, draw = randomised(provider, case)
        x = draw(case.batch, case.length, case.hidden_size)
        session = Session(layer, x, case.steps, cached=provider.cached, compiled=provider.compiled)

        @torch.no_grad()
        def evaluate(exact_in: torch.dtype | None) -> dict[str, Tensor]:
            if exact_in is not None:
                output = provider.exact(deepcopy(layer).to(exact_in), x.to(exact_in))
                return {"output": output[:, -session.steps :]}
            session.decode()
            session.rewind()
            return {"output": session.decode()}

        return compare(evaluate, case.dtype)

    def prepare(self, provider: DecodeProvider, case: DecodeCase, mode: str) -> Prepared:
        if not provider.cached and case.length > case.recompute_limit:
            raise SkipError(f"takes too long beyond {case.recompute_limit} tokens (--recompute-limit)")
        x = torch.randn(case.batch, case.length, case.hidden_size, **case.factory)
        layer = provider.build(case)
        session = Session(layer, x, case.steps, cached=provider.cached, compiled=provider.compiled)
        # memory grows, and kernels are compiled or chosen, in the first one
        session.seconds()

        def figures(median: float) -> dict[str, Any]:
            cache, numbers = session.cache, CacheSpec.of(layer.config).numbers_per_token
            return {
                "parameters": count_parameters(layer),
                "cache_bytes_per_token": None if cache is None else numbers * x.itemsize,
                "cache_bytes": None if cache is None else cache.nbytes,
            }

        return Prepared(session.seconds, figures)


def _hyperglu_window(case: DecodeCase) -> AttentionLayer:
    return HyperGLU(case.hidden_size, case.num_heads, max_lag=case.window, layer_idx=0, **case.factory)


_ours = partial(DecodeProvider, exact=by_reference)
_baseline = partial(DecodeProvider, exact=by_dense_softmax, baseline=True)
DECODE_PROVIDERS = (
    _ours("hyperglu", "HyperGLU with a cache, max_lag = the context", build=hyperglu("auto")),
    _ours("hyperglu-window", "HyperGLU with a cache and a window", build=_hyperglu_window),
    _ours(
        "hyperglu-recompute", "HyperGLU over the whole context for every token",
        build=hyperglu("auto"), baseline=True, cached=False,
    ),
    _baseline("softmax", "softmax (SDPA) with a cache, same hidden size", build=softmax),
    _baseline("softmax-wide", "softmax with a cache, widened to the parameters of hyperglu", build=softmax_wide),
)  # fmt: skip
# a minute of compiling for every context
COMPILED_PROVIDERS = (
    _ours(
        "hyperglu-compiled", "HyperGLU with max_lag = the context, compiled with a static cache",
        build=hyperglu("auto"), compiled=True,
    ),
    _ours(
        "hyperglu-window-compiled", "HyperGLU with a window, compiled with a static cache",
        build=_hyperglu_window, compiled=True,
    ),
    _baseline(
        "softmax-wide-compiled", "softmax-wide, compiled with a static cache", build=softmax_wide, compiled=True
    ),
)  # fmt: skip
DECODE_PROVIDERS_ON_GPU = (
    _ours("hyperglu-triton", "HyperGLU with a cache, fused kernels", build=hyperglu("triton")),
    *DECODE_PROVIDERS,
)
