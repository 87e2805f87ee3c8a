"""Layers whose heads read through the operator."""

from __future__ import annotations

from torch import Tensor

from hypermlp.config import HyperConfig
from hypermlp.layers.base import AttentionLayer
from hypermlp.layers.feature_mixing import Gates
from hypermlp.ops.arguments import OperatorArgs, Options, SequenceMix
from hypermlp.ops.attention import attend
from hypermlp.ops.checks import check_plain
from hypermlp.ops.decode import Past, StepArgs, decode_block, decode_step
from hypermlp.ops.modes import autocast_enabled, without_autocast
from hypermlp.ops.paths import choose
from hypermlp.ops.varlen import Tokens


class OperatorLayer(AttentionLayer):
    """Reads by the operator, and by its decoding forms where there is a cache."""

    def _configure(self, config: HyperConfig) -> None:
        super()._configure(config)
        c, selection = config, "glu" if config.num_maps == 2 else "relu"
        self._options = Options(selection, c.norm, c.eps, c.causal, c.layout, c.max_lag)

    def check_input(self, hidden_states: Tensor) -> None:
        if isinstance(hidden_states, Tensor):
            check_plain("hidden_states", hidden_states)
        super().check_input(hidden_states)

    def mixes(self, q: Tensor, gates: Gates) -> tuple[SequenceMix, SequenceMix]:
        """First and second sequence mixing of the tokens with these queries and ``gates``; here none."""
        return SequenceMix(), SequenceMix()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, tokens: Tokens) -> Tensor:
        return attend(OperatorArgs(q, k, v, *self.mixes(q, gates), tokens, self._options), self.backend)

    def attend_step(self, q: Tensor, gates: Gates, past: Past) -> Tensor:
        path = choose(self.backend, q)
        step = decode_step if path is None else path.step
        x = StepArgs(q, past, *self.mixes(q, gates), self._options)
        if autocast_enabled(q.device.type):
            with without_autocast(q.device.type):
                return step(x)
        return step(x)

    def attend_block(self, q: Tensor, gates: Gates, past: Past) -> Tensor:
        with without_autocast(q.device.type):
            path = choose(self.backend, q)
            return decode_block(StepArgs(q, past, *self.mixes(q, gates), self._options), path)
