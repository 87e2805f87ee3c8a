"""What every attention layer here is: one door, and one way from hidden states to output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from einops import rearrange
from torch import Tensor

from hypermlp.cache import CacheSpec, HyperCache, LayerCache, Part, StaticLayerCache
from hypermlp.cache.state import refuse_gradients
from hypermlp.checks import check_kind
from hypermlp.config import HyperConfig
from hypermlp.layers.feature_mixing import Gates
from hypermlp.layers.streams import Projections, Streams
from hypermlp.ops import checks
from hypermlp.ops.decode import Past
from hypermlp.ops.modes import context_parallel, traced
from hypermlp.ops.varlen import ALL_TOKENS, Tokens, longest_row, newest, sequence_origins, unpacked, zero_padded


class AttentionLayer(Projections, ABC):
    """From hidden states to output by way of queries, keys and values.

    Subclasses say in :meth:`attend` how heads read from one another. All that is computed stands
    in ``config``, a :class:`~hypermlp.HyperConfig`.
    """

    # in the place of forward where a sequence is spread over processes: of the layer, rows, their mask, and bounds
    over_processes: Callable[[AttentionLayer, Tensor, Tensor | None, Tensor | None], Tensor] | None = None

    def _configure(self, config: HyperConfig) -> None:
        super()._configure(config)
        self._cache_spec = CacheSpec.of(config) if config.causal else None

    @property
    def cache_spec(self) -> CacheSpec | None:
        """Sizes of this layer's part of a cache; None for a bidirectional layer, which has none."""
        return self._cache_spec

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **self.with_part(args, kwargs))

    def with_part(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keywords of a call with this layer's part in the place of its cache, if it is the layer's turn.

        Outside of what ``compile()`` compiles: a graph that finds its part by ``layer_idx`` serves one layer alone.
        """
        cache = kwargs.get("cache")
        if not isinstance(cache, HyperCache):
            return kwargs
        part = self.cache_part(cache)
        x = args[0] if args else kwargs.get("hidden_states")
        packed = kwargs.get("cu_seqlens") is not None
        cache.take_turn(self, self.layer_idx, part, None if packed or not isinstance(x, Tensor) else x.shape[-2])
        return kwargs | {"cache": part}

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        cache: HyperCache | Part | None = None,
    ) -> Tensor:
        """One attention layer over a batch, or over the tokens that follow a cache.

        Args:
            hidden_states: ``[B, T, hidden_size]``; of no rows or no tokens the output is empty, too.
            attention_mask: bool or integer ``[B, T]``, 1 for a valid token. Padded tokens, left,
                right or inside, are as if they did not exist, and get zeros.
            cu_seqlens: bounds of packed sequences, int32 or int64 ``[N + 1]``, with ``B = 1``. Tokens outside
                all of them are padding; equal neighbours are an empty sequence. With a cache they must
                come first, and are its ``N`` rows from then on.
            cache: earlier tokens, which these follow and are added to; inference only. The mask
                then counts the new tokens, or all of them. :meth:`cache_part` of it will do.

        Returns:
            ``[B, T, hidden_size]``.
        """
        if self.over_processes is not None:
            if cache is not None:
                raise ValueError("a layer after shard_sequence has no cache: generate with a model that is not sharded")
            return self.over_processes(self, hidden_states, attention_mask, cu_seqlens)
        part = None if cache is None else self.cache_part(cache)
        tokens = self.tokens(hidden_states, attention_mask, cu_seqlens, part)
        if part is not None:
            new = hidden_states.shape[1]
            if new == 1 and not part.empty:
                return self._step(hidden_states[:, 0], tokens.valid, part)[:, None]
            if not new:
                return hidden_states.new_empty(hidden_states.shape)  # nothing to take in
        x = tokens.zeroed(hidden_states)
        q, k, v, gates = self.streams(x, tokens, part)
        if part is None or part.empty:
            o = self.attend(q, k, v, gates, tokens)  # o_i = sum_l w_i[l] v_{i-l}, w_i = sigma(q_i K^T R1) R2^T
        else:
            o = self.attend_block(q, gates, part.extended(k, v, tokens.valid))  # the same over earlier tokens, too
        if part is not None:
            refuse_gradients(q)
            rows = unpacked(k, v, x, tokens)
            if rows[0].shape[1]:  # not where every sequence is empty
                part.append(*rows)
        return tokens.zeroed(self.output(rearrange(o, "b t h v -> b t (h v)"), gates))  # (o * phi(x Wm2 + b)) Wo

    def cache_part(self, cache: HyperCache | Part) -> Part:
        """This layer's part of ``cache``, or ``cache`` where it is that; ValueError for a bidirectional layer."""
        if traced():
            raise RuntimeError(
                "torch.jit.trace records one run, and a cache changes from run to run: trace without cache=, "
                "or compile a step with HyperCache(static=True, max_length=...) by torch.compile"
            )
        spec = self._cache_spec or CacheSpec.of(self.config)
        if isinstance(cache, HyperCache):
            return cache.layer(self.layer_idx, spec)
        if not isinstance(cache, (LayerCache, StaticLayerCache)):
            raise TypeError(f"cache must be a HyperCache, got {type(cache).__name__}")
        if cache.spec is not spec and cache.spec != spec:
            raise ValueError(f"cache is another layer's part: {cache.spec}, not {spec}")
        return cache

    def tokens(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        part: Part | None = None,
    ) -> Tokens:
        """Who is there of ``hidden_states``, after what the cache's ``part`` holds: the door, where all is checked."""
        self.check_input(hidden_states)
        if self.over_processes is not None:
            raise ValueError("a layer after shard_sequence has some rows of a sequence alone: call the layer itself")
        if attention_mask is None and cu_seqlens is None:
            return ALL_TOKENS
        if part is not None:
            if cu_seqlens is not None and not part.empty:
                raise ValueError(
                    "cu_seqlens is for the first call of a cache: later tokens come as a batch of its rows"
                )
            if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
                attention_mask = newest(attention_mask, hidden_states.shape[1], part.known_length)
        return checks.tokens(hidden_states, attention_mask, cu_seqlens)

    def streams(self, x: Tensor, tokens: Tokens = ALL_TOKENS, part: Part | None = None) -> Streams:
        """What heads read of hidden states ``[B, T, hidden_size]``, zero at padding; ``part`` stays as it is."""
        earlier = None if part is None or part.empty else part
        offset = self._offset(x, tokens, earlier)
        gates = self.gates(x)  # phi(x W + b)
        q = self.queries(x, gates, offset)  # (x Wq) * phi(x Wm1 + b)
        if part is not None:
            part.check(q, longest_row(tokens, x.shape[1]))
        past = None if earlier is None else earlier.inputs(x)
        k, v = self.keys_values(x, tokens, offset, past)  # conv(x) Wk, conv'(x) Wv
        return Streams(q, k, v, gates)

    def _offset(self, x: Tensor, tokens: Tokens, earlier: Part | None) -> int | Tensor:
        """Angles count from each sequence's first valid token: a gate after the rotation feels where they start."""
        if not self._config.rope:
            return 0
        if earlier is not None:
            return earlier.offset(tokens.valid)
        return 0 if tokens.one_sequence_a_row else -sequence_origins(tokens, x.shape[0], x.shape[1], x.device)

    def _step(self, x: Tensor, valid: Tensor | None, part: Part) -> Tensor:
        """One token a row after a cache, ``[B, hidden_size]`` to the same: heads and time have no dimensions here."""
        if valid is not None:
            x = zero_padded(x, valid)
        config = self._config
        offset = part.offset(valid) if config.rope else 0
        gates = self.gates(x)
        q = self._gated_queries(x, gates, offset)
        refuse_gradients(q)
        part.check(q, 1)
        window = part.window(x) if config.conv_size else x
        k_conv, v_conv = self.k_conv, self.v_conv
        k = self._rotated(self.k_proj(window if k_conv is None else k_conv(window, newest=True)), offset)
        v = self.v_proj(window if v_conv is None else v_conv(window, newest=True))
        if valid is not None:
            k, v = zero_padded(k, valid), zero_padded(v, valid)
        out = self.output(self.attend_step(q, gates, part.step(k, v, valid)), gates)
        return out if valid is None else zero_padded(out, valid)

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, tokens: Tokens) -> Tensor:
        """What each head reads, ``[B, T, H, V]``; that of padding means nothing.

        ``q`` and ``gates`` may be of the last tokens alone; keys, values and ``tokens`` are of all.
        """

    @abstractmethod
    def attend_step(self, q: Tensor, gates: Gates, past: Past) -> Tensor:
        """What the newest token, ``q`` ``[B, S*H*K]``, reads from all that ``past`` holds, ``[B, H*V]``."""

    @abstractmethod
    def attend_block(self, q: Tensor, gates: Gates, past: Past) -> Tensor:
        """What a block of the newest tokens reads from all that ``past`` holds, ``[B, m, H, V]``."""

    def check_input(self, hidden_states: Tensor) -> None:
        """TypeError or ValueError for what are no hidden states."""
        if context_parallel():
            raise RuntimeError(
                "torch's context_parallel (accelerate's cp_size) knows scaled_dot_product_attention alone: here each "
                "process would attend to its own tokens only; use hypermlp.distributed.shard_sequence instead"
            )
        check_kind("hidden_states", hidden_states, Tensor)
        if not hidden_states.is_floating_point():
            raise TypeError(f"hidden_states must be floating point, got {hidden_states.dtype}")
        if hidden_states.is_nested:
            checks.check_plain("hidden_states", hidden_states)
        if hidden_states.ndim != 3 or hidden_states.shape[-1] != self._config.hidden_size:
            raise ValueError(
                f"hidden_states must be [batch, length, {self.config.hidden_size}], got {tuple(hidden_states.shape)}"
            )
